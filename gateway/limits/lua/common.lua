-- What all scripts share: Redis's own clock, windows of a minute, days and months. It is put in front of each of them.
local time = redis.call('TIME')
local second = tonumber(time[1])
local now = second * 1000 + math.floor(tonumber(time[2]) / 1000)
local today = math.floor(second / 86400)

-- A window is a hash: one count for each second of the last 61, n their sum, o the oldest second, l the newest.
local function add_to(key, count)
    if redis.call('HINCRBY', key, 'n', count) == count then
        redis.call('HSETNX', key, 'o', second)
    end
    redis.call('HINCRBY', key, second, count)
    redis.call('HSET', key, 'l', second)
    redis.call('EXPIRE', key, 70)
end

-- The number of the month, counted from the year 0, in which a day lies, counted from 1970
-- (civil_from_days of Howard Hinnant's "chrono-Compatible Low-Level Date Algorithms").
local function month_of(day)
    local z = day + 719468
    local era = math.floor(z / 146097)
    local doe = z - era * 146097
    local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
    local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
    local mp = math.floor((5 * doy + 2) / 153)
    local month = mp < 10 and mp + 3 or mp - 9
    return (yoe + era * 400 + (month <= 2 and 1 or 0)) * 12 + month
end

