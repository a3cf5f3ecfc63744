-- A backend refuses connections: what it had loaded is gone with its server.
-- KEYS: box, the hash of the backend (see residents.lua). ARGV: ms at which it was asked.
for _, field in ipairs(redis.call('HKEYS', KEYS[1])) do
    local model = string.match(field, '^r:(.+)$')
    local since = model and string.match(redis.call('HGET', KEYS[1], field), '^%S+ (%d+)')
    if model and (tonumber(since) or 0) <= tonumber(ARGV[1]) then redis.call('HDEL', KEYS[1], field, 's:' .. model) end
end
redis.call('HDEL', KEYS[1], 'polled')
return redis.call('HGETALL', KEYS[1])
