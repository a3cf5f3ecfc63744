-- A process says that it lives.
-- KEYS: processes. ARGV: process id; life of a process in ms.
-- Answers the ids of all processes that live.
redis.call('ZADD', KEYS[1], now + tonumber(ARGV[2]), ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
return redis.call('ZRANGE', KEYS[1], 0, -1)
