-- Counters that all jobs share. One that holds no whole number begins again: it must stop no job.
local function value(raw)
  local found = tonumber(raw or '0')
  return found and math.abs(found) < 2 ^ 53 and found or 0
end
local function add(key, field, by)
  local raw = redis.call('HGET', key, field)
  if raw and not (#raw < 16 and string.match(raw, '^%-?%d+$')) then redis.call('HDEL', key, field) end
  return redis.call('HINCRBY', key, field, by)
end
