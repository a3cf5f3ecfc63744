-- name: make_migrations_table
-- The table of applied migrations.
CREATE TABLE IF NOT EXISTS schema_migrations (
    version    integer PRIMARY KEY,
    name       text NOT NULL,
    sha256     text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
);

-- name: applied_migrations
-- The applied migrations, the oldest first.
SELECT version, name, sha256 FROM schema_migrations ORDER BY version;

-- name: note_migration
-- Notes a migration as applied.
INSERT INTO schema_migrations (version, name, sha256) VALUES ($1, $2, $3);

-- name: schema_state
-- The newest applied migration, and whether the session is read-only, as on a standby.
SELECT max(version) AS version, current_setting('transaction_read_only')::boolean AS is_read_only FROM schema_migrations;

-- name: lock_migrations
-- Locks out other migrations until the transaction ends.
SELECT pg_advisory_xact_lock(7237310974231);
