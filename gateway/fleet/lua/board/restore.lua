-- Puts the calls of a process in order after Redis has lost them, or has missed that they ended.
-- ARGV: time; process; how many of its calls wait, and each; then 9 values of each that runs: call, backend, model, group, client,
-- its user, weight, cost in ms, ms since it began.
-- Answers {how many calls were removed, and how many were added}.
local pid, known, removed, added = ARGV[2], {}, 0, 0
lease(pid)
local at = 4 + tonumber(ARGV[3])
for i = 4, at - 1 do known[ARGV[i]] = true end
for i = at, #ARGV, 9 do known[ARGV[i]] = true end
for _, id in ipairs(redis.call('HKEYS', F .. 'calls:' .. pid)) do
    if not known[id] then
        free(pid, id, -1)
        removed = removed + 1
    end
end
for i = at, #ARGV, 9 do
    local id, b, m, group, client, sub, weight, cost = unpack(ARGV, i, i + 7)
    local text = redis.call('HGET', F .. 'calls:' .. pid, id)
    local r = text and words(text)
    if not r or r[1] ~= 'r' or r[2] ~= b or r[3] ~= m then
        if r then
            free(pid, id, 0)
            removed = removed + 1
        end
        local began = now - tonumber(ARGV[i + 8])
        redis.call('ZADD', F .. 'ends:' .. b .. FS .. m, began + tonumber(cost), id)
        redis.call('HSET', F .. 'calls:' .. pid, id, joined('r', b, m, group, client, sub, weight, cost, began, 'restored', 0))
        charge_both(group, client, sub, tonumber(cost) / tonumber(weight), 1)
        added = added + 1
    end
end
if is_waiting() then dispatch() end
return {removed, added}
