-- ARGV: id, now, status data, final data. Returns missing, canceled, requested or ended.
begin_to_free()
local id = ARGV[1]
if not mend(id) then return 'missing' end
local status = get(id, 'status')
if status == 'queued' then
  finish(id, 'canceled', tonumber(ARGV[2]), ARGV[3], 'done', ARGV[4])
  return 'canceled'
end
if status == 'running' then
  redis.call('HSET', key(id), 'cancel', 1)
  return 'requested'
end
return 'ended'
