-- A key is an identity with its rights; its secrets come and go (rotation keeps the identity).
CREATE TABLE keys (
    id           text PRIMARY KEY,
    name         text NOT NULL CHECK (name <> '' AND length(name) <= 200),
    models       text[] NOT NULL DEFAULT '{}',
    rpm          bigint CHECK (rpm >= 0),
    tpm          bigint CHECK (tpm >= 0),
    concurrent   bigint CHECK (concurrent >= 0),
    flags        text[] NOT NULL DEFAULT '{}',
    created_at   timestamptz NOT NULL DEFAULT now(),
    expires_at   timestamptz,
    revoked_at   timestamptz,
    last_used_at timestamptz
);

-- A name means one living key, so that operators can say it instead of the id.
CREATE UNIQUE INDEX keys_living_name ON keys (name) WHERE revoked_at IS NULL;

CREATE TABLE secrets (
    id         text PRIMARY KEY,
    key_id     text NOT NULL REFERENCES keys (id) ON DELETE CASCADE,
    hash       text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz
);

CREATE INDEX secrets_of_key ON secrets (key_id);
