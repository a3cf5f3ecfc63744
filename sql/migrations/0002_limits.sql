-- NULL: not said, the default applies. 0: none at all. 9223372036854775807: unlimited.
ALTER TABLE keys
    ADD COLUMN day bigint CHECK (day >= 0),
    ADD COLUMN month bigint CHECK (month >= 0),
    ADD COLUMN prompt_log boolean NOT NULL DEFAULT false,
    ADD COLUMN prompt_retention interval,
    ADD COLUMN audit_retention interval,
    ADD COLUMN prompts_forgotten_at timestamptz;

-- Limits for those models of a key whose names match a glob; they hold beside the key's own.
CREATE TABLE model_limits (
    key_id     text NOT NULL REFERENCES keys (id) ON DELETE CASCADE,
    pattern    text NOT NULL CHECK (pattern <> '' AND length(pattern) <= 350),
    rpm        bigint CHECK (rpm >= 0),
    tpm        bigint CHECK (tpm >= 0),
    concurrent bigint CHECK (concurrent >= 0),
    day        bigint CHECK (day >= 0),
    month      bigint CHECK (month >= 0),
    PRIMARY KEY (key_id, pattern)
);
