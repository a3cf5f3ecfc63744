-- What take.lua would decide, without taking anything.
-- ARGV: as of take.lua.
-- Answers JSON: the place in the queue that the call would have (0: none) and how many calls and tokens are in it, whether it
-- would be refused because the queue is full, ms that it would wait (-1: unknown), ms until its first token, and all candidates
-- with the terms of their estimates; only `fast` decides by these.
local call = read_call(ARGV)

-- As the rule evaluates them, all with all terms.
local function all_terms()
    local all, chosen = evaluate(call)
    if call.mode == 'fast' then return all, chosen end
    local nowhere, full, of_chosen = is_nowhere(call), {}, nil
    for i, c in ipairs(call.cands) do
        local by_rule, e = all[i] or estimate_in_order(call, c), estimate(call, c, nowhere)
        e.can, e.why = by_rule.can, by_rule.why
        full[i] = e
        if by_rule == chosen then of_chosen = e end
    end
    return full, of_chosen
end

-- Its place among those that wait, which have what they will probably get.
local function position_of()
    local groups = waiting_groups(call.group, call)
    forget_wants(groups)
    for _, calls in ipairs(groups) do
        for i, one in ipairs(calls) do
            if one == call then return i end
            if one.group ~= call.group and not has_free_slot(one) then break end
            local _, e = evaluate(one)
            wait_on(one, e)
        end
    end
end

local size = redis.call('HMGET', F .. 'size:' .. call.group, 'n', 't')
local n, t = tonumber(size[1] or 0), tonumber(size[2] or 0)
local found = position_of()
local all, chosen = all_terms()
local position, ms = found or n + 1, chosen.t - chosen.evict
if not found then ms = math.max(ms, position * chosen.c.service_ms / slots_of(call)) end
local is_full = call.patience <= 0 or not has_room(call, n, t, tonumber(ARGV[11]), tonumber(ARGV[12]))
if chosen.can and not keeps_back(call) then position, is_full = 0, false end

local function bounded(number) return math.min(NEVER, number) end

local places = {}
for _, e in ipairs(all) do
    places[#places + 1] = {
        backend = e.c.b, model = e.c.m, tier = e.c.tier, slots = e.c.slots, running = running_in(place_of(e.c)), why = e.why,
        can = e.can, load = e.load, evict = e.evict, block = bounded(e.block), queue = bounded(e.queue), prefill = e.prefill,
        cached = e.cached, total = bounded(e.t), penalty = e.malus, is_chosen = e == chosen,
    }
end
local wait = position == 0 and 0 or bounded(ms - chosen.load - chosen.prefill)
-- Nothing but the rule holds it back, for a time that is not known.
if position > 0 and wait <= 0 then wait = -1 end
return cjson.encode({position = position, waiting = n, tokens = t, full = is_full, wait = wait, ms = bounded(ms), places = places})
