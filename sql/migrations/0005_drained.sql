-- Backends that get no new requests until somebody says otherwise.
CREATE TABLE drained (
    backend text PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT now(),
    -- The id of the key that said so, or 'operator' for the command line.
    by text NOT NULL
);
