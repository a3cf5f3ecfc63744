-- What take.lua would decide, without taking anything.
-- ARGV: as of take.lua.
-- Answers JSON: the place in the queue (0: none), ms until the first token, the chosen candidate, and the terms of all.
local call = read_call(ARGV)
local n = tonumber(redis.call('HGET', F .. 'size:' .. call.group, 'n') or 0)
for _, calls in ipairs(waiting_groups()) do
    for _, one in ipairs(calls) do
        local _, e = evaluate(one)
        local row = row_of(e.c)
        if #row > 0 then occupy(row, math.max(now + e.load + e.block, row[1]) + e.prefill + e.c.service_ms) end
    end
end
local all, chosen = evaluate(call)
local terms = {}
for _, e in ipairs(all) do
    terms[#terms + 1] = {
        backend = e.c.b, model = e.c.m, tier = e.c.tier, slots = e.c.slots, running = running_in(place_of(e.c)), why = e.why,
        can = e.can, load = e.load, evict = e.evict, block = e.block, queue = e.queue, prefill = e.prefill, cached = e.cached,
        total = math.min(NEVER, e.t), copy = e.malus, is_chosen = e == chosen,
    }
end
local position = (chosen.can and n == 0) and 0 or n + 1
return cjson.encode({position = position, waiting = n, ms = math.min(NEVER, chosen.t - chosen.evict), places = terms})
