-- Publishes a gateway process and answers which processes are active.
-- KEYS: processes, a sorted set of ids and the time until which each is active; states, a hash of ids and what each published.
-- ARGV: process id; ms for which it stays active; its state.
-- Answers the ids of all active processes.
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
redis.call('ZADD', KEYS[1], now + tonumber(ARGV[2]), ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
redis.call('HSET', KEYS[2], ARGV[1], ARGV[3])
return redis.call('ZRANGE', KEYS[1], 0, -1)
