-- name: find_any_key
-- A key by its id, by the id of one of its secrets or by its name, revoked or not; of several keys of a name the newest.
SELECT k.id, k.name FROM keys k
WHERE k.id = coalesce((SELECT key_id FROM secrets WHERE id = $1),
                      (SELECT id FROM keys WHERE name = $1 ORDER BY created_at DESC LIMIT 1));

-- name: list_audit
-- Rows of the audit, the newest first: of a key, of models, since a time, with a status in a range, by the start of the outcome.
SELECT a.id::text AS id, a.at, a.batch, a.request_id, a.key_id, k.name AS key, a.client, a.agent, a.dialect, a.method, a.route,
       a.model, a.answered_as, a.backend, a.attempts::text AS attempts, a.status, a.outcome, a.detail, a.stream, a.prompt_tokens,
       a.completion_tokens, a.cached_tokens, a.billed_tokens, a.tokens_from, a.bytes_in, a.bytes_out, a.queue_ms, a.ttfb_ms,
       a.total_ms, coalesce(a.translated_to, '') AS translated_to, coalesce(a.dropped, '') AS dropped,
       a.load_ms, a.prefill_ms, a.decode_ms, a.backend_ms, coalesce(a.seconds_from, 'none') AS seconds_from,
       coalesce(a.loaded, false) AS loaded, coalesce(a.chosen_because, '') AS chosen_because, a.estimated_ms,
       coalesce(a.queue_position, 0) AS queue_position
FROM audit a LEFT JOIN keys k ON k.id = a.key_id
WHERE ($1::text IS NULL OR a.key_id = $1)
  -- canonical_model is slow, so most rows are decided without it: every spelling of the model contains $8, and a name without
  -- a host, a namespace and a source suffix can lack only its tag.
  AND ($2::text[] IS NULL OR CASE
       WHEN NOT a.model ILIKE ANY ($8::text[]) THEN false
       WHEN a.model = '' OR strpos(a.model, '/') > 0 OR strpos(a.model, ' ') > 0 OR lower(right(a.model, 6)) = ':local'
       THEN canonical_model(a.model) LIKE ANY ($2)
       WHEN strpos(a.model, ':') > 0 THEN lower(a.model) LIKE ANY ($2)
       ELSE lower(a.model) || ':latest' LIKE ANY ($2) END)
  AND ($3::timestamptz IS NULL OR a.at >= $3)
  AND ($4::integer IS NULL OR a.status BETWEEN $4 AND $5)
  AND ($6::text IS NULL OR starts_with(a.outcome, $6))
ORDER BY a.at DESC, a.id DESC
LIMIT $7;

-- name: sum_audit
-- Sums of the audit since a time, by any of key, model, answered_as, backend and day; the times are of requests that were answered.
-- Rows of operators' reads in the admin API, which earlier versions wrote, are not traffic and not counted.
-- All spellings of a model count as one; each spelling is resolved once.
WITH names AS MATERIALIZED (
    SELECT found.spelling, canonical_model(found.spelling) AS name
    FROM (SELECT model AS spelling FROM audit WHERE at >= $2 AND 'model' = ANY ($1::text[])
          UNION
          SELECT answered_as FROM audit WHERE at >= $2 AND 'answered_as' = ANY ($1) AND answered_as <> '') AS found
)
SELECT s.day, s.key_id, k.name AS key, s.model, s.answered_as, s.backend, s.requests, s.answered, s.failures, s.refused, s.prompt_tokens,
       s.completion_tokens, s.cached_tokens, s.billed_tokens, s.backend_s, s.load_s, s.loads, s.ttfb[1] AS ttfb_p50, s.ttfb[2] AS ttfb_p95, s.ttfb[3] AS ttfb_p99
FROM (SELECT CASE WHEN 'day' = ANY ($1) THEN (at AT TIME ZONE 'UTC')::date END AS day,
             CASE WHEN 'key' = ANY ($1) THEN key_id END AS key_id,
             CASE WHEN 'model' = ANY ($1) THEN asked.name END AS model,
             CASE WHEN 'answered_as' = ANY ($1) THEN served.name END AS answered_as,
             CASE WHEN 'backend' = ANY ($1) THEN backend END AS backend,
             count(*) AS requests,
             count(*) FILTER (WHERE outcome = 'answered') AS answered,
             count(*) FILTER (WHERE outcome IN ('backend_failed', 'truncated')) AS failures,
             count(*) FILTER (WHERE starts_with(outcome, 'refused')) AS refused,
             sum(prompt_tokens)::bigint AS prompt_tokens,
             sum(completion_tokens)::bigint AS completion_tokens,
             coalesce(sum(cached_tokens), 0)::bigint AS cached_tokens,
             sum(coalesce(billed_tokens, prompt_tokens + completion_tokens))::bigint AS billed_tokens,
             coalesce(sum(backend_ms), 0) / 1000 AS backend_s,
             coalesce(sum(load_ms) FILTER (WHERE loaded), 0) / 1000 AS load_s,
             count(*) FILTER (WHERE loaded) AS loads,
             percentile_cont(ARRAY[0.5, 0.95, 0.99]) WITHIN GROUP (ORDER BY ttfb_ms) AS ttfb
      FROM audit LEFT JOIN names asked ON asked.spelling = model LEFT JOIN names served ON served.spelling = answered_as
      WHERE at >= $2 AND NOT (starts_with(route, '/admin/') AND method IN ('GET', 'HEAD'))
      GROUP BY 1, 2, 3, 4, 5) AS s
LEFT JOIN keys k ON k.id = s.key_id
ORDER BY s.day DESC, s.requests DESC, k.name, s.key_id, s.model, s.answered_as, s.backend;

-- name: trace_request
-- The rows of one request: by our id, or by its caller's, which may not be unique.
SELECT a.id::text AS id, a.at, a.request_id, a.key_id, k.name AS key, a.client, a.agent, a.dialect, a.method, a.route,
       a.model, a.answered_as, a.backend, a.attempts::text AS attempts, a.status, a.outcome, a.detail, a.stream, a.prompt_tokens,
       a.completion_tokens, a.cached_tokens, a.billed_tokens, a.tokens_from, a.bytes_in, a.bytes_out, a.queue_ms, a.ttfb_ms,
       a.total_ms, coalesce(a.translated_to, '') AS translated_to, coalesce(a.dropped, '') AS dropped,
       a.load_ms, a.prefill_ms, a.decode_ms, a.backend_ms, coalesce(a.seconds_from, 'none') AS seconds_from,
       coalesce(a.loaded, false) AS loaded, coalesce(a.chosen_because, '') AS chosen_because, a.estimated_ms,
       coalesce(a.queue_position, 0) AS queue_position
FROM audit a LEFT JOIN keys k ON k.id = a.key_id
WHERE (a.id = $1::uuid OR a.request_id = $2) AND a.at >= $3
ORDER BY a.at, a.id
LIMIT $4;
