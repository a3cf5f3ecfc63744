-- name: lock_audit
-- Locks out other writers of the audit until the transaction ends.
SELECT pg_advisory_xact_lock(7237310974232);

-- name: add_audit_rows
-- Adds the rows that are not there yet, as one batch of the chain; returns how many these were.
SELECT audit_add($1);

-- name: make_audit_partition
-- Makes the partition for the month of a time; returns its name if it was missing.
SELECT audit_make_partition($1);

-- name: add_prompts
-- Adds prompts of keys that keep them, unless an operator has had them forgotten since.
INSERT INTO prompts (id, at, key_id, expires_at, request, answer, is_cut)
SELECT p.id, p.at, p.key_id, p.at + coalesce(k.prompt_retention, $7::interval), p.request, p.answer, p.is_cut
FROM unnest($1::uuid[], $2::timestamptz[], $3::text[], $4::text[], $5::text[], $6::boolean[]) AS p (id, at, key_id, request, answer, is_cut)
JOIN keys k ON k.id = p.key_id
WHERE k.prompt_log AND (k.prompts_forgotten_at IS NULL OR p.at > k.prompts_forgotten_at)
ON CONFLICT DO NOTHING;
