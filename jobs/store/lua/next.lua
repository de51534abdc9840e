-- ARGV: queue, RQ's list of it. Puts the job whose turn it is at the head of the list, where RQ's own
-- pop finds it; its turn is over when it runs. What stands there without a turn was put back, or
-- comes from elsewhere: it is next. Returns the client of what is next, false where nothing waits.
local queue, list = ARGV[1], ARGV[2]
local head = redis.call('LINDEX', list, 0)
if not head then return false end
local next, waits = head, false
for _, priority in ipairs(PRIORITIES) do
  waits = waits or redis.call('ZSCORE', turns(queue, priority), head)
end
for _, priority in ipairs(waits and PRIORITIES or {}) do
  local found = redis.call('ZRANGE', turns(queue, priority), 0, 0)[1]
  while found and found ~= head and redis.call('LREM', list, 1, found) == 0 do
    leave(queue, found, '', 0, true)  -- it was taken from the list unseen
    found = redis.call('ZRANGE', turns(queue, priority), 0, 0)[1]
  end
  if found then
    if found ~= head then redis.call('LPUSH', list, found) end
    next = found
    break
  end
end
local client = redis.pcall('HGET', key(next), 'client')
return type(client) == 'string' and client or ''  -- something else may stand under the key
