-- What became of every authenticated request, by months, so that old months can go as a whole.
CREATE TABLE audit (
    id                uuid NOT NULL,
    at                timestamptz NOT NULL,
    batch             bigint NOT NULL,
    request_id        text NOT NULL,
    key_id            text NOT NULL,
    client            text NOT NULL,
    agent             text NOT NULL,
    dialect           text NOT NULL,
    method            text NOT NULL,
    route             text NOT NULL,
    model             text NOT NULL,
    answered_as       text NOT NULL,
    backend           text NOT NULL,
    attempts          jsonb NOT NULL,
    status            integer NOT NULL,
    outcome           text NOT NULL,
    detail            text NOT NULL,
    stream            boolean NOT NULL,
    prompt_tokens     bigint NOT NULL,
    completion_tokens bigint NOT NULL,
    tokens_from       text NOT NULL,
    bytes_in          bigint NOT NULL,
    bytes_out         bigint NOT NULL,
    queue_ms          double precision NOT NULL,
    ttfb_ms           double precision,
    total_ms          double precision,
    PRIMARY KEY (at, id)
) PARTITION BY RANGE (at);

CREATE INDEX audit_of_key ON audit (key_id, at) INCLUDE (model, prompt_tokens, completion_tokens);
CREATE INDEX audit_of_request ON audit (request_id);
CREATE INDEX audit_of_batch ON audit (batch);

-- The chain: each batch of rows carries the digest over its rows and over the digest before it.
-- `purged` holds the hashes of rows that retention took; `gone` says that it took all.
CREATE TABLE audit_batches (
    id       bigint PRIMARY KEY,
    day      date NOT NULL,
    at       timestamptz NOT NULL DEFAULT now(),
    rows     integer NOT NULL,
    previous bytea NOT NULL,
    digest   bytea NOT NULL,
    purged   bytea NOT NULL DEFAULT '',
    gone     boolean NOT NULL DEFAULT false
);

-- Where the chain begins, after its oldest batches were purged.
CREATE TABLE audit_anchor (
    single boolean PRIMARY KEY DEFAULT true CHECK (single),
    batch  bigint NOT NULL,
    digest bytea NOT NULL
);

-- Requests and answers of those keys alone that were made with a prompt log.
CREATE TABLE prompts (
    id         uuid PRIMARY KEY,
    at         timestamptz NOT NULL,
    key_id     text NOT NULL,
    expires_at timestamptz NOT NULL,
    request    text NOT NULL,
    answer     text NOT NULL,
    is_cut     boolean NOT NULL
);

CREATE INDEX prompts_expiring ON prompts (expires_at);
CREATE INDEX prompts_of_key ON prompts (key_id, at);

-- One row's hash: the same text of it whatever the session's settings. The batch is part of it.
CREATE FUNCTION audit_hash(a audit) RETURNS bytea LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT sha256(convert_to(jsonb_build_array(
        a.id, extract(epoch FROM a.at), a.batch, a.request_id, a.key_id, a.client, a.agent, a.dialect, a.method, a.route,
        a.model, a.answered_as, a.backend, a.attempts, a.status, a.outcome, a.detail, a.stream, a.prompt_tokens,
        a.completion_tokens, a.tokens_from, a.bytes_in, a.bytes_out, encode(float8send(a.queue_ms), 'hex'),
        encode(float8send(a.ttfb_ms), 'hex'), encode(float8send(a.total_ms), 'hex'))::text, 'UTF8'))
$$;

-- Makes the partition of the month in which `at` lies; returns its name where it is new.
-- Attaching, unlike making it as a partition, waits for nobody who reads or writes.
CREATE FUNCTION audit_make_partition(at timestamptz) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    begins timestamp := date_trunc('month', at AT TIME ZONE 'UTC');
    partition text := 'audit_' || to_char(begins, 'YYYY_MM');
BEGIN
    IF to_regclass(format('%I', partition)) IS NOT NULL THEN
        RETURN NULL;
    END IF;
    EXECUTE format('CREATE TABLE %I (LIKE audit INCLUDING DEFAULTS)', partition);
    EXECUTE format('ALTER TABLE audit ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
                   partition, begins AT TIME ZONE 'UTC', (begins + interval '1 month') AT TIME ZONE 'UTC');
    RETURN partition;
END
$$;

-- Takes away a month as a whole; false where somebody reads the audit, so that nobody has to wait behind us for long.
CREATE FUNCTION audit_drop_partition(name text) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    IF name !~ '^audit_\d{4}_\d{2}$' THEN
        RAISE EXCEPTION 'not a partition of the audit: %', name;
    END IF;
    SET LOCAL lock_timeout = '100ms';
    EXECUTE format('DROP TABLE %I', name);
    RETURN true;
EXCEPTION WHEN lock_not_available THEN
    RETURN false;
END
$$;
