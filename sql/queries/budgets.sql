-- name: tokens_spent
-- The tokens billed to a key for each model, since the beginning of the day and since that of the month.
-- They are all tokens, plus the differences of rows billed for fewer: each part has its own index, and few rows have the second.
SELECT model, coalesce(sum(tokens) FILTER (WHERE at >= $2), 0)::bigint AS day, sum(tokens)::bigint AS month
FROM (SELECT model, at, prompt_tokens + completion_tokens AS tokens FROM audit WHERE key_id = $1 AND at >= $3
      UNION ALL
      SELECT model, at, billed_tokens - prompt_tokens - completion_tokens FROM audit
      WHERE key_id = $1 AND at >= $3 AND billed_tokens IS NOT NULL) AS spent
GROUP BY model;

-- name: seconds_spent
-- The milliseconds of backends that a key's calls took for each model, since the beginning of the day and since that of the month.
SELECT model, coalesce(round(sum(backend_ms) FILTER (WHERE at >= $2)), 0)::bigint AS day, round(sum(backend_ms))::bigint AS month
FROM audit
WHERE key_id = $1 AND at >= $3 AND backend_ms IS NOT NULL
GROUP BY model;
