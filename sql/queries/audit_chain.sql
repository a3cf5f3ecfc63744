-- name: audit_batches_after
-- The next batches of the chain with the hashes of their rows, and the rows of missing batches; at most so many batches and rows.
WITH links AS MATERIALIZED (
    SELECT * FROM (SELECT b.*, sum(b.rows) OVER (ORDER BY b.id) - b.rows AS rows_before
                   FROM (SELECT * FROM audit_batches WHERE id > $1 ORDER BY id LIMIT $2) AS b) AS counted
    WHERE rows_before < $3
), found AS (
    SELECT batch, string_agg(audit_hash(a), ''::bytea) AS hashes FROM audit a
    WHERE batch > $1 AND batch <= (SELECT max(id) FROM links)
    GROUP BY batch
)
SELECT coalesce(l.id, f.batch) AS batch, l.day, l.at, l.rows AS expected, l.gone, l.previous, l.digest,
       coalesce(l.purged, ''::bytea) AS purged, coalesce(f.hashes, ''::bytea) AS hashes
FROM links l FULL JOIN found f ON f.batch = l.id
ORDER BY 1;

-- name: audit_rows_outside_chain
-- Rows of batches before the beginning of the chain or after its end.
SELECT batch, count(*) AS found FROM audit
WHERE batch <= coalesce((SELECT batch FROM audit_anchor), 0)
   OR batch > greatest((SELECT max(id) FROM audit_batches), (SELECT batch FROM audit_anchor), 0)
GROUP BY batch
ORDER BY batch
LIMIT $1;
