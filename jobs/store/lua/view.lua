-- ARGV: id, prefix of RQ's queue lists. A job with all that a view of it needs, in one round trip:
-- {record, index of outputs, place in the queue or -1, image-steps to its end}.
local id = ARGV[1]
if redis.call('EXISTS', key(id)) == 0 then return {} end
local queue, status, before, left = get(id, 'queue') or '', get(id, 'status'), -1, 0
if active(status) then
  local place, priority
  for _, each in ipairs(PRIORITIES) do
    local found = redis.call('ZSCORE', turns(queue, each), id)
    if found then place, priority = tonumber(found), each end
  end
  if place then
    before = redis.call('ZRANK', turns(queue, priority), id)
    if priority == 'normal' then before = before + redis.call('ZCARD', turns(queue, 'high')) end
  elseif status == 'queued' then
    before = redis.call('LPOS', ARGV[2] .. queue, id) or -1
  end
  local work = number(id, 'work') - number(id, 'done')
  left = ahead(queue, get(id, 'client') or '', work, priority, place)
end
return {redis.call('HGETALL', key(id)), redis.call('HGETALL', key(id) .. ':index'), before, left}
