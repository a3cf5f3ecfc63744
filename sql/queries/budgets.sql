-- name: tokens_spent
-- What a key's requests of each model were counted for since the day's and since the month's beginning.
-- All tokens, less what rows were billed below that: both parts are in indexes of their own, and few rows have the second.
SELECT model, coalesce(sum(tokens) FILTER (WHERE at >= $2), 0)::bigint AS day, sum(tokens)::bigint AS month
FROM (SELECT model, at, prompt_tokens + completion_tokens AS tokens FROM audit WHERE key_id = $1 AND at >= $3
      UNION ALL
      SELECT model, at, billed_tokens - prompt_tokens - completion_tokens FROM audit
      WHERE key_id = $1 AND at >= $3 AND billed_tokens IS NOT NULL) AS spent
GROUP BY model;
