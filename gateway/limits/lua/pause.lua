-- Gives up the slots of a call that waits for a backend; it keeps what it has reserved.
-- KEYS: for each counter set: slots, queue.
-- ARGV: call id; ms of the lease; channel for freed slots.
-- Answers how many slots came free.
local free = 0
for i = 1, #KEYS, 2 do
    if redis.call('ZSCORE', KEYS[i], ARGV[1]) then
        redis.call('ZADD', KEYS[i], PAUSED + now + tonumber(ARGV[2]), ARGV[1])
        free = free + 1
        if redis.call('EXISTS', KEYS[i + 1]) == 1 then redis.call('PUBLISH', ARGV[3], KEYS[i + 1]) end
    end
end
return free
