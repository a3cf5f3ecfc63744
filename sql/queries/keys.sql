-- name: find_secret
-- A secret by its id, with its hash and its key, whatever the state of both.
SELECT s.hash, k.id, k.name, k.models, k.rpm, k.tpm, k.concurrent, k.day, k.month, k.day_seconds, k.month_seconds,
       k.weight, k.heartbeat_after_s, k.flags, k.prompt_log,
       least(k.expires_at, s.expires_at) AS expires_at, k.revoked_at,
       (SELECT coalesce(jsonb_agg(to_jsonb(m) - 'key_id' ORDER BY m.pattern), '[]') FROM model_limits m WHERE m.key_id = k.id)::text
           AS rules
FROM secrets s JOIN keys k ON k.id = s.key_id
WHERE s.id = $1;

-- name: add_key
-- Adds a key with its rights.
INSERT INTO keys (id, name, models, rpm, tpm, concurrent, day, month, day_seconds, month_seconds, flags, expires_at, prompt_log,
                  prompt_retention, audit_retention, weight, heartbeat_after_s)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17);

-- name: limit_key
-- Sets the given limits and options of a key: for each its value, and whether it is given.
UPDATE keys SET rpm = CASE WHEN $3::boolean THEN $2 ELSE rpm END,
                tpm = CASE WHEN $5::boolean THEN $4 ELSE tpm END,
                concurrent = CASE WHEN $7::boolean THEN $6 ELSE concurrent END,
                day = CASE WHEN $9::boolean THEN $8 ELSE day END,
                month = CASE WHEN $11::boolean THEN $10 ELSE month END,
                day_seconds = CASE WHEN $13::boolean THEN $12 ELSE day_seconds END,
                month_seconds = CASE WHEN $15::boolean THEN $14 ELSE month_seconds END,
                weight = CASE WHEN $17::boolean THEN coalesce($16::double precision, 1) ELSE weight END,
                heartbeat_after_s = CASE WHEN $19::boolean THEN $18 ELSE heartbeat_after_s END
WHERE id = $1
RETURNING rpm, tpm, concurrent, day, month, day_seconds, month_seconds, weight, heartbeat_after_s;

-- name: limit_models
-- Sets the given limits of a key for the models that match a glob, unless the key has $17 other globs.
INSERT INTO model_limits AS m (key_id, pattern, rpm, tpm, concurrent, day, month, day_seconds, month_seconds)
SELECT $1::text, $2::text, $3::bigint, $5::bigint, $7::bigint, $9::bigint, $11::bigint, $13::bigint, $15::bigint
WHERE (SELECT count(*) FROM model_limits WHERE key_id = $1 AND pattern <> $2) < $17::integer
ON CONFLICT (key_id, pattern) DO UPDATE
SET rpm = CASE WHEN $4::boolean THEN $3 ELSE m.rpm END,
    tpm = CASE WHEN $6::boolean THEN $5 ELSE m.tpm END,
    concurrent = CASE WHEN $8::boolean THEN $7 ELSE m.concurrent END,
    day = CASE WHEN $10::boolean THEN $9 ELSE m.day END,
    month = CASE WHEN $12::boolean THEN $11 ELSE m.month END,
    day_seconds = CASE WHEN $14::boolean THEN $13 ELSE m.day_seconds END,
    month_seconds = CASE WHEN $16::boolean THEN $15 ELSE m.month_seconds END
RETURNING m.rpm, m.tpm, m.concurrent, m.day, m.month, m.day_seconds, m.month_seconds;

-- name: drop_model_limits
-- Deletes a rule that limits nothing any more.
DELETE FROM model_limits WHERE key_id = $1 AND pattern = $2;

-- name: add_secret
-- Adds a secret to a key.
INSERT INTO secrets (id, key_id, hash) VALUES ($1, $2, $3);

-- name: expire_secrets
-- Expires all other secrets of the key at a time, unless they expire before.
UPDATE secrets SET expires_at = least(expires_at, $3) WHERE key_id = $1 AND id <> $2;

-- name: secret_ids
-- The ids of all secrets of a key.
SELECT id FROM secrets WHERE key_id = $1;

-- name: find_key_by_id
-- A key by its id or that of one of its secrets, active or not.
SELECT k.id, k.name, k.expires_at, k.revoked_at FROM secrets s JOIN keys k ON k.id = s.key_id WHERE s.id = $1;

-- name: find_living_key
-- An active key by its id, by the id of one of its secrets or by its name; an id that exists is never treated as a name.
SELECT k.id, k.name, k.expires_at FROM keys k
WHERE k.revoked_at IS NULL
  AND k.id = coalesce((SELECT key_id FROM secrets WHERE id = $1),
                      (SELECT id FROM keys WHERE name = $1 AND revoked_at IS NULL));

-- name: lock_key
-- Locks a key until the transaction ends, so that rotations and revocations do not overlap.
SELECT revoked_at FROM keys WHERE id = $1 FOR UPDATE;

-- name: revoke_key
-- Revokes a key with all of its secrets.
UPDATE keys SET revoked_at = now() WHERE id = $1 AND revoked_at IS NULL;

-- name: drop_drill_keys
-- Deletes the keys of drills that ended some time ago.
DELETE FROM keys WHERE $1::text = ANY (flags) AND least(revoked_at, expires_at) < now() - $2::interval;

-- name: list_keys
-- All keys, active ones first, then the newest, with the number of secrets that are valid now.
SELECT k.id, k.name, k.models, k.rpm, k.tpm, k.concurrent, k.day, k.month, k.day_seconds, k.month_seconds,
       k.weight, k.heartbeat_after_s, k.flags, k.prompt_log, k.created_at, k.expires_at,
       k.revoked_at, k.last_used_at,
       (SELECT coalesce(jsonb_agg(to_jsonb(m) - 'key_id' ORDER BY m.pattern), '[]') FROM model_limits m WHERE m.key_id = k.id)::text
           AS rules,
       (SELECT count(*) FROM secrets s WHERE s.key_id = k.id AND (s.expires_at IS NULL OR s.expires_at > now())) AS secrets
FROM keys k
ORDER BY (k.revoked_at IS NOT NULL), k.created_at DESC, k.id;

-- name: count_living_keys
-- The number of keys that are neither revoked nor expired.
SELECT count(*) FROM keys WHERE revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now());

-- name: note_use
-- Notes when keys were last used, many at a time.
UPDATE keys SET last_used_at = greatest(keys.last_used_at, used.at)
FROM unnest($1::text[], $2::timestamptz[]) AS used (id, at)
WHERE keys.id = used.id;

-- name: key_with_rights
-- A key with its limits and rules.
SELECT k.id, k.name, k.models, k.rpm, k.tpm, k.concurrent, k.day, k.month, k.day_seconds, k.month_seconds,
       k.weight, k.heartbeat_after_s, k.flags, k.prompt_log, k.expires_at, k.revoked_at,
       (SELECT coalesce(jsonb_agg(to_jsonb(m) - 'key_id' ORDER BY m.pattern), '[]') FROM model_limits m WHERE m.key_id = k.id)::text
           AS rules
FROM keys k
WHERE k.id = $1;
