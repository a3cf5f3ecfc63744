-- Long calls keep their leases; this process says that it lives.
-- KEYS: leases, processes; then slots of one scope of one call each.
-- ARGV: process id; lease in ms; life of a process in ms; then the call's id for each of the slots.
-- Answers the ids of all processes that live.
for i = 4, #ARGV do
    redis.call('ZADD', KEYS[1], 'XX', now + tonumber(ARGV[2]), ARGV[i])
    redis.call('ZADD', KEYS[i - 1], 'XX', now + tonumber(ARGV[2]), ARGV[i])
end
redis.call('ZADD', KEYS[2], now + tonumber(ARGV[3]), ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
return redis.call('ZRANGE', KEYS[2], 0, -1)
