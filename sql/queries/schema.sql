-- name: make_migrations_table
-- The record of what was applied.
CREATE TABLE IF NOT EXISTS schema_migrations (
    version    integer PRIMARY KEY,
    name       text NOT NULL,
    sha256     text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
);

-- name: applied_migrations
-- What was applied, oldest first.
SELECT version, name, sha256 FROM schema_migrations ORDER BY version;

-- name: note_migration
-- One more was applied.
INSERT INTO schema_migrations (version, name, sha256) VALUES ($1, $2, $3);

-- name: schema_state
-- The newest migration applied, and whether this session may only read, as on a standby.
SELECT max(version) AS version, current_setting('transaction_read_only')::boolean AS is_read_only FROM schema_migrations;

-- name: lock_migrations
-- One migrator at a time, until its transaction ends.
SELECT pg_advisory_xact_lock(7237310974231);
