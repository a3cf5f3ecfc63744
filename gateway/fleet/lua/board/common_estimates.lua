-- The rule: which of its candidates a call should go to, by estimates in ms.

-- In times of its load: how long a model stays after its load while it is in use or not, and how long after its last call it
-- counts as in use.
local HOLD, HOLD_IDLE, KEEP = 2, 1, 2
-- What it must save to leave the place where a conversation is cached, in ms and as a share.
local STAY_MS, STAY_SHARE = 500, 0.2
-- What another conversation loses with its cache counts up to a part of the call's own time.
local FORGET_SHARE = 0.2
-- The load of one more copy counts so many times, because it takes memory and time from everybody: less, the longer calls have
-- had to wait for one, in times of the load.
local COPY, COPY_LESS, COPY_IN_NEED = 2, 3, 0.2
-- What a copy may cost others, in times of its own load.
local MOST_HARM = 0.75

-- Models for which calls wait.
local awaited = {}

-- What may have to go from a backend so that a model can be loaded: until when that is busy, until when it stays, what its own
-- reload would take, and whether it is certain that it must go.
local function victims_of(box, c)
    if box.victims[c.m] then return box.victims[c.m] end
    local found = {busy = 0, stays = 0, harm = 0, certain = false, names = {}}
    box.victims[c.m] = found
    if c.size > 0 and box.sum + c.size <= box.seen then return found end
    local by_use = {}
    for m, resident in pairs(box.residents) do
        by_use[#by_use + 1] = {m = m, resident = resident, running = running_in(c.b .. FS .. m)}
    end
    table.sort(by_use, function(x, y)
        if (x.running > 0) ~= (y.running > 0) then return y.running > 0 end
        if x.resident.used ~= y.resident.used then return x.resident.used < y.resident.used end
        return x.m < y.m
    end)
    found.certain = box.room > 0 and box.sum + c.size >= box.room
    local sum = box.sum
    for _, victim in ipairs(by_use) do
        if #found.names > 0 and (sum + c.size <= box.seen or (box.room > 0 and sum + c.size < box.room)) then break end
        sum = sum - victim.resident.size
        found.names[#found.names + 1] = victim.m
        local load_ms = box.load_ms[victim.m] or (c.size > 0 and c.load_ms * victim.resident.size / c.size) or c.load_ms
        local is_needed = victim.running > 0 or awaited[victim.m]
        if victim.running > 0 then found.busy = math.max(found.busy, last_of(c.b .. FS .. victim.m)) end
        if is_needed or now - victim.resident.used < KEEP * load_ms then
            found.harm = found.harm + load_ms
            local hold = is_needed and HOLD or HOLD_IDLE
            found.stays = math.max(found.stays, victim.resident.since + hold * load_ms)
            if not is_needed then wake_at(victim.resident.used + KEEP * load_ms) end
        end
    end
    return found
end

-- For how long calls of a group have been waiting without a pause, or since the last copy was loaded.
local function pressed_for(group)
    local since = redis.call('HGET', F .. 'size:' .. group, 'since')
    return since and math.max(0, now - tonumber(since)) or 0
end

local function estimate_resident(call, c, e, box)
    local forgotten
    e.cached, e.home, forgotten = cached_of(call, c)
    e.malus = math.min(forgotten * c.prefill_us / 1000, FORGET_SHARE * c.service_ms)
    e.why = e.home and 'home' or 'loaded'
    if box and box.evicts[c.m] then
        e.can, e.block = false, box.loading and math.max(box.loading.ends - now, 0) or 0
    elseif box and box.blocked[c.m] then
        e.can, e.block = false, box.blocked_ms
    end
end

local function estimate_loading(c, e, box)
    local left = math.max(box.loading.ends - now, (now - box.loading.began) * 0.2)
    if box.loading.m == c.m then
        e.load, e.why, e.queue = left, 'join', math.max(0, e.queue - left)
    else
        e.load, e.why, e.block, e.can = c.load_ms, 'load', left, false
    end
end

local function estimate_load(call, c, e, box, is_nowhere)
    local victims = victims_of(box, c)
    e.load, e.evict, e.victims, e.why = c.load_ms, victims.harm, victims, 'load'
    if is_nowhere then
        e.block = math.max(0, math.max(victims.certain and victims.busy or 0, victims.stays) - now)
        e.can = e.can and e.block == 0
        wake_at(victims.stays)
    else
        local need = pressed_for(call.group) / (c.load_ms + victims.harm)
        if #victims.names > 0 then e.malus = c.load_ms * (math.max(COPY_IN_NEED, COPY - COPY_LESS * need) - 1) end
        local is_idle = victims.busy == 0 and victims.stays <= now
        -- It may fit beside them; if not, what goes is soon there again.
        local is_worth_trying = not victims.certain and need >= 0.5 and is_idle and victims.harm <= MOST_HARM * c.load_ms
        e.can = e.can and (victims.harm == 0 or is_worth_trying)
    end
    if box.want and box.want ~= c.m then e.can = false end
end

-- How long a call would wait for its first token at a candidate, and whether it `can` begin there now.
local function estimate(call, c, is_nowhere)
    local e = {c = c, load = 0, evict = 0, block = 0, cached = 0, malus = 0}
    e.queue = math.max((row_of(c)[1] or NEVER) - now, 0)
    e.can = e.queue == 0
    local box = c.swaps and box_of(c.b)
    if not box or box.residents[c.m] then
        estimate_resident(call, c, e, box)
    elseif box.loading then
        estimate_loading(c, e, box)
    else
        estimate_load(call, c, e, box, is_nowhere)
        e.can = e.can and not box.settles
    end
    local own = math.max(0, call.prompt - e.cached) * c.prefill_us / 1000
    e.prefill = own
    -- Prompts that are read at the same time share the backend.
    for _, at in ipairs(firsts_of(c.b)) do
        e.prefill = e.prefill + math.min(own, math.max(0, at - now - e.load - e.block - e.queue))
    end
    e.t = e.load + e.evict + e.block + e.queue + e.prefill
    return e
end

local function is_nowhere(call)
    for _, c in ipairs(call.cands) do
        if not c.swaps or has(box_of(c.b), c.m) then return false end
    end
    return true
end

-- The first of the best; a conversation stays where it is cached unless another place saves enough.
local function best_of(estimates)
    local best, home
    for _, e in ipairs(estimates) do
        if not best or e.t + e.malus < best.t + best.malus - 1 then best = e end
        if e.home and (not home or e.t < home.t) then home = e end
    end
    if not home or best == home then return best end
    local saved = home.t - best.t - best.malus
    return saved > math.max(STAY_MS, home.t * STAY_SHARE) and best or home
end

-- `fast`: the estimates of all candidates, and the chosen one.
local function fastest_of(call)
    local nowhere, tiers, all = is_nowhere(call), {}, {}
    for _, c in ipairs(call.cands) do
        local e = estimate(call, c, nowhere)
        all[#all + 1] = e
        if #tiers == 0 or tiers[#tiers].tier ~= c.tier then tiers[#tiers + 1] = {tier = c.tier} end
        table.insert(tiers[#tiers], e)
    end
    local chosen = best_of(tiers[1])
    for i = 2, #tiers do
        local lower = best_of(tiers[i])
        if call.spill >= 0 and lower.t + call.spill < chosen.t then
            chosen = lower
            chosen.why = 'spill'
        elseif chosen.why == 'load' and (lower.why == 'loaded' or lower.why == 'home') then
            chosen.why = 'tier'
        end
    end
    return all, chosen
end

local function estimate_in_order(call, c)
    local e = {c = c, load = 0, evict = 0, block = 0, queue = 0, cached = 0, malus = 0, why = 'order'}
    e.can = running_in(place_of(c)) < c.slots
    if not e.can then e.queue = math.max((row_of(c)[1] or NEVER) - now, 0) end
    e.prefill = call.prompt * c.prefill_us / 1000
    if call.mode == 'warm' then
        local box = c.swaps and box_of(c.b)
        if not box or box.residents[c.m] then
            e.why = 'loaded'
        elseif box.loading and box.loading.m == c.m then
            e.load, e.why = math.max(0, box.loading.ends - now), 'join'
        else
            e.load, e.why = c.load_ms, 'load'
            if box.loading then e.block, e.can = math.max(0, box.loading.ends - now), false end
            if box.settles then e.can = false end
        end
    end
    e.t = e.load + e.block + e.queue + e.prefill
    return e
end

-- `order`: the first with a free slot. `warm`: of its tier the first that has the model, too.
local function first_of(call)
    local all, chosen = {}, nil
    for _, c in ipairs(call.cands) do
        local e = estimate_in_order(call, c)
        all[#all + 1] = e
        if e.can and not chosen then chosen = e end
        if e.can and chosen.load > 0 and e.load == 0 and e.c.tier == chosen.c.tier then chosen = e end
        if chosen and (call.mode == 'order' or chosen.load == 0) then break end
    end
    if chosen then return all, chosen end
    for _, e in ipairs(all) do
        if not chosen or e.t < chosen.t then chosen = e end
    end
    return all, chosen
end

local function evaluate(call)
    if call.mode == 'fast' then return fastest_of(call) end
    return first_of(call)
end
