-- The beginning of every script of this folder: the clock of Redis, windows of a minute, days and months.
local time = redis.call('TIME')
local second = tonumber(time[1])
local now = second * 1000 + math.floor(tonumber(time[2]) / 1000)
local today = math.floor(second / 86400)
-- In the sorted sets of slots, the score of a call that holds its slot is the end of its lease. One that waits for a backend has
-- given its slot up, but not what it has reserved; this is added to its score.
local PAUSED, PAUSED_TEXT = 1000000000000000, '1000000000000000'
-- What calls that wait for a slot of their key have in the place of the tokens that they have reserved.
local QUEUED = 'queued'

-- A window is a hash with a count for each of the last 61 seconds; n is their sum, o the oldest second, l the newest.
local function add_to(key, count)
    if redis.call('HINCRBY', key, 'n', count) == count then
        redis.call('HSETNX', key, 'o', second)
    end
    redis.call('HINCRBY', key, second, count)
    redis.call('HSET', key, 'l', second)
    redis.call('EXPIRE', key, 70)
end

-- The number of the month, counted from the year 0, that a day is in; days are counted from 1970
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

