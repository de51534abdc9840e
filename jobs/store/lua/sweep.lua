-- ARGV: now, seconds a record outlives its outputs, most entries to handle. Returns how many,
-- then the jobs whose outputs go.
begin_to_free()
local now, record_ttl = tonumber(ARGV[1]), tonumber(ARGV[2])
local due = redis.call('ZRANGEBYSCORE', P .. 'due', '-inf', now, 'LIMIT', 0, ARGV[3])
local gone = {#due}
local function handle(what, id)
  if not mend(id) then return end
  local status = get(id, 'status')
  if what == 'forget' then
    forget(id)
    table.insert(gone, id)
  elseif not active(status) then
    for _, part in ipairs({':index', ':inputs', ':events'}) do
      redis.call('DEL', key(id) .. part)
    end
    set_bytes(id, 0)
    table.insert(gone, id)
    if status ~= 'failed' then move(id, 'expired') end
    redis.call('ZADD', P .. 'due', now + record_ttl, 'forget:' .. id)
  end
end
for _, entry in ipairs(due) do
  redis.call('ZREM', P .. 'due', entry)
  local what, id = string.match(entry, '^(%a+):(.*)$')
  if id then pcall(handle, what, id) end  -- an entry that cannot be handled holds up no other
end
return gone
