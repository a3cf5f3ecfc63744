-- name: lock_audit
-- One writer of the audit at a time, until its transaction ends.
SELECT pg_advisory_xact_lock(7237310974232);

-- name: add_audit_rows
-- Those that are not there yet, as one link of the chain; how many they were.
SELECT audit_add($1);

-- name: make_audit_partition
-- The partition of a time's month; its name where it was not there yet.
SELECT audit_make_partition($1);

-- name: add_prompts
-- Prompts of keys that keep them, except where the operator has forgotten them since.
INSERT INTO prompts (id, at, key_id, expires_at, request, answer, is_cut)
SELECT p.id, p.at, p.key_id, p.at + coalesce(k.prompt_retention, $7::interval), p.request, p.answer, p.is_cut
FROM unnest($1::uuid[], $2::timestamptz[], $3::text[], $4::text[], $5::text[], $6::boolean[]) AS p (id, at, key_id, request, answer, is_cut)
JOIN keys k ON k.id = p.key_id
WHERE k.prompt_log AND (k.prompts_forgotten_at IS NULL OR p.at > k.prompts_forgotten_at)
ON CONFLICT DO NOTHING;
