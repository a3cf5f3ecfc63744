-- name: lock_audit
-- One writer of the audit at a time, until its transaction ends.
SELECT pg_advisory_xact_lock(7237310974232);

-- name: known_audit_rows
-- Which of these rows were written before.
SELECT a.id FROM unnest($1::timestamptz[], $2::uuid[]) AS asked (at, id) JOIN audit a ON a.at = asked.at AND a.id = asked.id;

-- name: make_audit_partition
-- The partition of a time's month; its name where it was not there yet.
SELECT audit_make_partition($1);

-- name: last_audit_batch
-- The end of the chain: the newest batch's number and digest, or the anchor that purging left.
SELECT id, digest FROM audit_batches
UNION ALL
SELECT batch, digest FROM audit_anchor
ORDER BY id DESC
LIMIT 1;

-- name: add_audit_batch
-- The next link of the chain, over the rows just written.
INSERT INTO audit_batches (id, day, rows, previous, digest)
SELECT $1, (now() AT TIME ZONE 'UTC')::date, count(*), $2, sha256($2 || string_agg(h, ''::bytea ORDER BY h))
FROM (SELECT audit_hash(a) AS h FROM audit a JOIN unnest($3::timestamptz[], $4::uuid[]) AS written (at, id)
      ON a.at = written.at AND a.id = written.id) AS hashes;

-- name: add_prompts
-- Prompts of keys that keep them, except where the operator has forgotten them since.
INSERT INTO prompts (id, at, key_id, expires_at, request, answer, is_cut)
SELECT p.id, p.at, p.key_id, p.at + coalesce(k.prompt_retention, $7::interval), p.request, p.answer, p.is_cut
FROM unnest($1::uuid[], $2::timestamptz[], $3::text[], $4::text[], $5::text[], $6::boolean[]) AS p (id, at, key_id, request, answer, is_cut)
JOIN keys k ON k.id = p.key_id
WHERE k.prompt_log AND (k.prompts_forgotten_at IS NULL OR p.at > k.prompts_forgotten_at)
ON CONFLICT DO NOTHING;
