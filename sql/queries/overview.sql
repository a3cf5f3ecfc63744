-- name: recent_sums
-- Sums of all requests since a time. Requests of drills and operators' reads in the admin API are not traffic, here and below.
SELECT count(*) AS requests,
       count(*) FILTER (WHERE outcome = 'answered') AS answered,
       count(*) FILTER (WHERE outcome IN ('backend_failed', 'truncated')) AS failures,
       count(*) FILTER (WHERE starts_with(outcome, 'refused')) AS refused,
       coalesce(sum(prompt_tokens), 0)::bigint AS prompt_tokens,
       coalesce(sum(completion_tokens), 0)::bigint AS completion_tokens,
       coalesce(sum(cached_tokens), 0)::bigint AS cached_tokens,
       coalesce(sum(backend_ms), 0) / 1000 AS backend_s,
       count(*) FILTER (WHERE loaded) AS loads,
       count(queue_position) AS waited,
       percentile_cont(0.5) WITHIN GROUP (ORDER BY queue_ms) FILTER (WHERE queue_position > 0) AS wait_p50_ms,
       percentile_cont(0.99) WITHIN GROUP (ORDER BY queue_ms) FILTER (WHERE queue_position > 0) AS wait_p99_ms,
       percentile_cont(0.5) WITHIN GROUP (ORDER BY ttfb_ms) AS ttfb_p50_ms,
       percentile_cont(0.99) WITHIN GROUP (ORDER BY ttfb_ms) AS ttfb_p99_ms
FROM audit WHERE at >= $1 AND key_id NOT IN (SELECT id FROM keys WHERE 'drill' = ANY (flags))
  AND NOT (starts_with(route, '/admin/') AND method IN ('GET', 'HEAD'));

-- name: busiest_keys
-- The keys with the most requests since a time, with the number of requests that a limit refused.
SELECT a.key_id, k.name AS key, count(*) AS requests,
       sum(a.prompt_tokens + a.completion_tokens)::bigint AS tokens,
       coalesce(sum(a.backend_ms), 0) / 1000 AS backend_s,
       count(*) FILTER (WHERE a.loaded) AS loads,
       count(*) FILTER (WHERE a.status = 429) AS limited,
       mode() WITHIN GROUP (ORDER BY a.detail) FILTER (WHERE a.status = 429) AS limit
FROM audit a LEFT JOIN keys k ON k.id = a.key_id
WHERE a.at >= $1 AND NOT coalesce('drill' = ANY (k.flags), false)
  AND NOT (starts_with(a.route, '/admin/') AND a.method IN ('GET', 'HEAD'))
GROUP BY a.key_id, k.name
ORDER BY requests DESC, a.key_id
LIMIT $2;

-- name: busiest_models
-- The models with the most requests since a time; all spellings of a model count as one.
WITH names AS MATERIALIZED (
    SELECT asked.model, canonical_model(asked.model) AS name
    FROM (SELECT DISTINCT model FROM audit WHERE at >= $1 AND model <> '') AS asked
)
SELECT n.name AS model, count(*) AS requests, sum(a.prompt_tokens + a.completion_tokens)::bigint AS tokens,
       coalesce(sum(a.backend_ms), 0) / 1000 AS backend_s, count(*) FILTER (WHERE a.loaded) AS loads,
       percentile_cont(0.5) WITHIN GROUP (ORDER BY a.ttfb_ms) AS ttfb_p50_ms
FROM audit a JOIN names n ON n.model = a.model
WHERE a.at >= $1 AND key_id NOT IN (SELECT id FROM keys WHERE 'drill' = ANY (flags))
GROUP BY n.name
ORDER BY requests DESC, n.name
LIMIT $2;

-- name: loading_keys
-- The keys whose calls caused the most loads since a time.
SELECT a.key_id, k.name AS key, count(*) AS loads, coalesce(sum(a.load_ms), 0) / 1000 AS load_s,
       mode() WITHIN GROUP (ORDER BY a.answered_as) AS model
FROM audit a LEFT JOIN keys k ON k.id = a.key_id
WHERE a.at >= $1 AND a.loaded AND NOT coalesce('drill' = ANY (k.flags), false)
GROUP BY a.key_id, k.name
ORDER BY loads DESC, load_s DESC, a.key_id
LIMIT $2;

-- name: recent_backends
-- What each backend has done since a time; all seconds of a request count for the backend that answered it.
SELECT backend, count(*) AS requests, sum(prompt_tokens + completion_tokens)::bigint AS tokens,
       coalesce(sum(cached_tokens), 0)::bigint AS cached_tokens, coalesce(sum(backend_ms), 0) / 1000 AS backend_s,
       count(*) FILTER (WHERE loaded) AS loads, coalesce(sum(load_ms) FILTER (WHERE loaded), 0) / 1000 AS load_s
FROM audit
WHERE at >= $1 AND backend <> '' AND key_id NOT IN (SELECT id FROM keys WHERE 'drill' = ANY (flags))
GROUP BY backend;

-- name: series
-- Sums by time steps of the same length; steps without requests are left out.
SELECT extract(epoch FROM date_bin($2::interval, at, timestamptz '2000-01-01'))::bigint AS at,
       count(*) AS requests,
       count(*) FILTER (WHERE outcome IN ('backend_failed', 'truncated')) AS failures,
       count(*) FILTER (WHERE starts_with(outcome, 'refused')) AS refused,
       sum(prompt_tokens)::bigint AS prompt_tokens,
       sum(completion_tokens)::bigint AS completion_tokens,
       coalesce(sum(backend_ms), 0) / 1000 AS backend_s,
       count(*) FILTER (WHERE loaded) AS loads,
       percentile_cont(0.5) WITHIN GROUP (ORDER BY ttfb_ms) AS ttfb_p50_ms,
       percentile_cont(0.99) WITHIN GROUP (ORDER BY ttfb_ms) AS ttfb_p99_ms
FROM audit
WHERE audit.at >= $1 AND key_id NOT IN (SELECT id FROM keys WHERE 'drill' = ANY (flags))
  AND NOT (starts_with(route, '/admin/') AND method IN ('GET', 'HEAD'))
GROUP BY 1
ORDER BY 1;
