-- name: find_secret
-- A presented secret id with its hash and the key it opens, whatever state both are in.
SELECT s.hash, k.id, k.name, k.models, k.rpm, k.tpm, k.concurrent, k.day, k.month, k.flags, k.prompt_log,
       least(k.expires_at, s.expires_at) AS expires_at, k.revoked_at,
       (SELECT coalesce(jsonb_agg(to_jsonb(m) - 'key_id' ORDER BY m.pattern), '[]') FROM model_limits m WHERE m.key_id = k.id)::text
           AS rules
FROM secrets s JOIN keys k ON k.id = s.key_id
WHERE s.id = $1;

-- name: add_key
-- A new key's identity and rights.
INSERT INTO keys (id, name, models, rpm, tpm, concurrent, day, month, flags, expires_at, prompt_log, prompt_retention, audit_retention)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13);

-- name: limit_key
-- Those limits of a key that were said: each a value and whether it was said.
UPDATE keys SET rpm = CASE WHEN $3::boolean THEN $2 ELSE rpm END,
                tpm = CASE WHEN $5::boolean THEN $4 ELSE tpm END,
                concurrent = CASE WHEN $7::boolean THEN $6 ELSE concurrent END,
                day = CASE WHEN $9::boolean THEN $8 ELSE day END,
                month = CASE WHEN $11::boolean THEN $10 ELSE month END
WHERE id = $1
RETURNING rpm, tpm, concurrent, day, month;

-- name: limit_models
-- Those limits of a key's models behind a glob that were said: each a value and whether it was said; none beyond $13 globs.
INSERT INTO model_limits AS m (key_id, pattern, rpm, tpm, concurrent, day, month)
SELECT $1::text, $2::text, $3::bigint, $5::bigint, $7::bigint, $9::bigint, $11::bigint
WHERE (SELECT count(*) FROM model_limits WHERE key_id = $1 AND pattern <> $2) < $13::integer
ON CONFLICT (key_id, pattern) DO UPDATE
SET rpm = CASE WHEN $4::boolean THEN $3 ELSE m.rpm END,
    tpm = CASE WHEN $6::boolean THEN $5 ELSE m.tpm END,
    concurrent = CASE WHEN $8::boolean THEN $7 ELSE m.concurrent END,
    day = CASE WHEN $10::boolean THEN $9 ELSE m.day END,
    month = CASE WHEN $12::boolean THEN $11 ELSE m.month END
RETURNING m.rpm, m.tpm, m.concurrent, m.day, m.month;

-- name: drop_model_limits
-- A rule that says nothing any more.
DELETE FROM model_limits WHERE key_id = $1 AND pattern = $2;

-- name: add_secret
-- A secret that opens a key.
INSERT INTO secrets (id, key_id, hash) VALUES ($1, $2, $3);

-- name: expire_secrets
-- Every other secret of the key ends at the given time, unless it ends before.
UPDATE secrets SET expires_at = least(expires_at, $3) WHERE key_id = $1 AND id <> $2;

-- name: secret_ids
-- The ids of all secrets of a key.
SELECT id FROM secrets WHERE key_id = $1;

-- name: find_key_by_id
-- The key of an id, its own or that of one of its secrets, living or not.
SELECT k.id, k.name, k.expires_at, k.revoked_at FROM secrets s JOIN keys k ON k.id = s.key_id WHERE s.id = $1;

-- name: find_living_key
-- The living key an operator means: what is the id of any key, or of one of its secrets, means that key alone; all else is a name.
SELECT k.id, k.name, k.expires_at FROM keys k
WHERE k.revoked_at IS NULL
  AND k.id = coalesce((SELECT key_id FROM secrets WHERE id = $1),
                      (SELECT id FROM keys WHERE name = $1 AND revoked_at IS NULL));

-- name: lock_key
-- Holds a key's row until the transaction ends, so that rotations and revocations come one after the other.
SELECT revoked_at FROM keys WHERE id = $1 FOR UPDATE;

-- name: revoke_key
-- From now on none of the key's secrets opens anything.
UPDATE keys SET revoked_at = now() WHERE id = $1 AND revoked_at IS NULL;

-- name: drop_drill_keys
-- Those with the flag of a drill that have been over for a time.
DELETE FROM keys WHERE $1::text = ANY (flags) AND least(revoked_at, expires_at) < now() - $2::interval;

-- name: list_keys
-- Every key, the living first, the newest first, with the number of secrets that open it now.
SELECT k.id, k.name, k.models, k.rpm, k.tpm, k.concurrent, k.day, k.month, k.flags, k.prompt_log, k.created_at, k.expires_at,
       k.revoked_at, k.last_used_at,
       (SELECT coalesce(jsonb_agg(to_jsonb(m) - 'key_id' ORDER BY m.pattern), '[]') FROM model_limits m WHERE m.key_id = k.id)::text
           AS rules,
       (SELECT count(*) FROM secrets s WHERE s.key_id = k.id AND (s.expires_at IS NULL OR s.expires_at > now())) AS secrets
FROM keys k
ORDER BY (k.revoked_at IS NOT NULL), k.created_at DESC, k.id;

-- name: count_living_keys
-- How many keys open something now.
SELECT count(*) FROM keys WHERE revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now());

-- name: note_use
-- When keys were last used, written in batches.
UPDATE keys SET last_used_at = greatest(keys.last_used_at, used.at)
FROM unnest($1::text[], $2::timestamptz[]) AS used (id, at)
WHERE keys.id = used.id;

-- name: key_with_rights
-- A key as its callers have it, whatever secret they use.
SELECT k.id, k.name, k.models, k.rpm, k.tpm, k.concurrent, k.day, k.month, k.flags, k.prompt_log, k.expires_at, k.revoked_at,
       (SELECT coalesce(jsonb_agg(to_jsonb(m) - 'key_id' ORDER BY m.pattern), '[]') FROM model_limits m WHERE m.key_id = k.id)::text
           AS rules
FROM keys k
WHERE k.id = $1;
