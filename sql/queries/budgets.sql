-- name: tokens_spent
-- What a key's requests of each model have cost since the day's and since the month's beginning.
SELECT model, coalesce(sum(prompt_tokens + completion_tokens) FILTER (WHERE at >= $2), 0)::bigint AS day,
       sum(prompt_tokens + completion_tokens)::bigint AS month
FROM audit
WHERE key_id = $1 AND at >= $3
GROUP BY model;
