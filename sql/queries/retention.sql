-- name: try_retention
-- Takes the lock of retention for this connection, until it is returned to the pool; false if another holds it.
SELECT pg_try_advisory_lock(7237310974233);

-- name: audit_months
-- The partitions of the audit, the oldest first, with the begin and end of each month and whether it is over.
SELECT name, begins AT TIME ZONE 'UTC' AS begins, (begins + interval '1 month') AT TIME ZONE 'UTC' AS ends,
       (begins + interval '1 month') AT TIME ZONE 'UTC' <= now() AS is_over
FROM (SELECT c.relname::text AS name, to_date(right(c.relname, 7), 'YYYY_MM')::timestamp AS begins
      FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
      WHERE i.inhparent = 'audit'::regclass AND c.relname ~ '^audit_\d{4}_\d{2}$') AS months
ORDER BY begins;

-- name: keys_in_month
-- The keys with rows in a month, and until when their rows have expired; the index is skipped from key to key.
WITH RECURSIVE present AS (
    (SELECT key_id FROM audit WHERE at >= $1 AND at < $2 ORDER BY key_id LIMIT 1)
    UNION ALL
    SELECT (SELECT a.key_id FROM audit a WHERE a.key_id > p.key_id AND a.at >= $1 AND a.at < $2 ORDER BY a.key_id LIMIT 1)
    FROM present p WHERE p.key_id IS NOT NULL
)
SELECT p.key_id, now() - coalesce(k.audit_retention, $3::interval) AS until,
       (SELECT min(at) FROM audit a WHERE a.key_id = p.key_id AND a.at >= $1 AND a.at < $2) AS oldest,
       (SELECT max(at) FROM audit a WHERE a.key_id = p.key_id AND a.at >= $1 AND a.at < $2) AS newest
FROM present p LEFT JOIN keys k ON k.id = p.key_id
WHERE p.key_id IS NOT NULL;

-- name: expired_audit_rows
-- Some expired rows of a month, about the oldest: for each key its rows since $2, where purging has come to, until $3.
SELECT a.at, a.id, k.id AS key_id
FROM unnest($1::text[], $2::timestamptz[], $3::timestamptz[]) AS k (id, since, until)
CROSS JOIN LATERAL (SELECT at, id FROM audit WHERE key_id = k.id AND at >= k.since AND at <= k.until AND at >= $4 AND at < $5
                    ORDER BY at LIMIT $6) AS a
ORDER BY a.at
LIMIT $7;

-- name: audit_rows_from
-- Some rows of a month, from a batch on, in the order of the chain.
SELECT at, id, batch FROM audit WHERE batch >= $3 AND at >= $1 AND at < $2 ORDER BY batch LIMIT $4;

-- name: purge_audit_rows
-- Deletes rows of a month; the chain keeps their hashes until all rows of the batch are deleted.
WITH purged AS (
    DELETE FROM audit a USING unnest($3::timestamptz[], $4::uuid[]) AS expired (at, id)
    WHERE a.at = expired.at AND a.id = expired.id AND a.at >= $1 AND a.at < $2
    RETURNING a.batch, audit_hash(a) AS hash
), noted AS (
    UPDATE audit_batches b
    SET purged = CASE WHEN length(b.purged) + length(p.hashes) = 32 * b.rows THEN ''::bytea ELSE b.purged || p.hashes END,
        gone = b.gone OR length(b.purged) + length(p.hashes) = 32 * b.rows
    FROM (SELECT batch, string_agg(hash, ''::bytea) AS hashes FROM purged GROUP BY batch) AS p
    WHERE b.id = p.batch
)
SELECT count(*) FROM purged;

-- name: audit_anchor
-- The batch after which the chain begins, since older ones were purged.
SELECT batch, digest FROM audit_anchor;

-- name: first_batch_elsewhere
-- The oldest batch after a given one that has a row outside of a month.
SELECT min(batch) FROM audit WHERE batch > $3 AND (at < $1 OR at >= $2);

-- name: chain_without_loss
-- The last batch, after one and before another, up to which nothing is missing that was not purged; and the rows until there.
WITH here AS (SELECT batch, count(*) AS rows FROM audit WHERE batch > $1 AND batch <= $1 + $3 AND batch < $2 GROUP BY batch),
links AS (SELECT id, rows, length(purged) AS purged, gone, row_number() OVER (ORDER BY id) AS place
          FROM audit_batches WHERE id > $1 AND id <= $1 + $3 AND id < $2),
checked AS (SELECT l.id, h.rows,
                   bool_and(l.id = $1 + l.place AND CASE WHEN l.gone THEN h.rows IS NULL
                                                         ELSE l.purged + 32 * coalesce(h.rows, 0) = 32 * l.rows END)
                       OVER (ORDER BY l.id) AS is_whole
            FROM links l LEFT JOIN here h ON h.batch = l.id)
SELECT max(id) AS batch, coalesce(sum(rows), 0)::bigint AS rows FROM checked WHERE is_whole;

-- name: newest_batch_of_month
-- The newest batch with a row in a month.
SELECT max(batch) FROM audit WHERE at >= $1 AND at < $2;

-- name: drop_audit_partition
-- Drops a month as a whole; false if the audit is being read.
SELECT audit_drop_partition($1);

-- name: move_audit_anchor
-- Lets the chain begin after this batch.
INSERT INTO audit_anchor (batch, digest) SELECT id, digest FROM audit_batches WHERE id = $1
ON CONFLICT (single) DO UPDATE SET batch = excluded.batch, digest = excluded.digest;

-- name: trim_audit_chain
-- Deletes some of the batches before the beginning of the chain.
WITH trimmed AS (
    DELETE FROM audit_batches WHERE id IN
        (SELECT id FROM audit_batches WHERE id <= (SELECT batch FROM audit_anchor) ORDER BY id LIMIT $1)
    RETURNING id
)
SELECT count(*) FROM trimmed;

-- name: purge_prompts
-- Deletes some expired prompts, from where the last call ended.
WITH purged AS (
    DELETE FROM prompts WHERE id = ANY (ARRAY(
        SELECT id FROM prompts WHERE expires_at >= $1 AND expires_at <= now() ORDER BY expires_at LIMIT $2))
    RETURNING expires_at
)
SELECT count(*) AS rows, max(expires_at) AS until FROM purged;

-- name: forget_prompts
-- Marks the prompts of a key as forgotten until now, also those that are still to be written.
UPDATE keys SET prompts_forgotten_at = clock_timestamp() WHERE id = $1 RETURNING prompts_forgotten_at;

-- name: purge_prompts_of_key
-- Deletes some prompts of a key up to a time, from where the last call ended.
WITH purged AS (
    DELETE FROM prompts WHERE id = ANY (ARRAY(
        SELECT id FROM prompts WHERE key_id = $3 AND at >= $1 AND at <= $4 ORDER BY at LIMIT $2))
    RETURNING at
)
SELECT count(*) AS rows, max(at) AS until FROM purged;
