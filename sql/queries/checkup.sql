-- name: server_facts
-- What an installation needs of the server: version, clock, writability, connections, the right to make audit partitions.
SELECT current_setting('server_version') AS version, current_setting('server_version_num')::integer AS number,
       clock_timestamp() AS now, current_setting('transaction_read_only')::boolean AS is_read_only,
       least(current_setting('max_connections')::integer - current_setting('superuser_reserved_connections')::integer
                 - coalesce(current_setting('reserved_connections', true)::integer, 0),
             (SELECT nullif(datconnlimit, -1) FROM pg_database WHERE datname = current_database()),
             (SELECT nullif(rolconnlimit, -1) FROM pg_roles WHERE rolname = current_user)) AS connections,
       coalesce(has_schema_privilege(current_schema(), 'CREATE'), false) AS may_create,
       coalesce((SELECT pg_has_role(relowner, 'USAGE') FROM pg_class WHERE oid = to_regclass('audit')), false) AS owns_audit;

-- name: count_audit_rows_roughly
-- The server's last estimate of the rows of the audit; counting them would read them all.
SELECT coalesce(sum(greatest(c.reltuples, 0)), 0)::bigint
FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
WHERE i.inhparent = to_regclass('audit');

-- name: count_waits
-- Calls of the last day by backend and model, and how many of them had to wait for a slot.
SELECT backend, canonical_model(answered_as) AS model, sum(calls)::bigint AS calls, sum(waited)::bigint AS waited
FROM (SELECT backend, answered_as, count(*) AS calls, count(queue_position) AS waited
      FROM audit WHERE at >= now() - interval '1 day' AND backend <> '' AND answered_as <> ''
      GROUP BY backend, answered_as) AS spelled
GROUP BY 1, 2;
