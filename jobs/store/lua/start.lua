-- ARGV: id, execution, worker, now, digest, status data, canceled data, final data, provenance.
-- Returns {what, attempts}: run, canceled, ended or missing.
local id, execution, now = ARGV[1], ARGV[2], tonumber(ARGV[4])
local status = get(id, 'status')
if not status then return {'missing', 0} end
if not active(status) then return {'ended', 0} end
if get(id, 'cancel') == '1' then
  finish(id, 'canceled', now, ARGV[7], 'done', ARGV[8])
  return {'canceled', 0}
end
if get(id, 'execution') ~= execution then redis.call('HINCRBY', key(id), 'attempts', 1) end
redis.call('HSET', key(id), 'execution', execution, 'worker', ARGV[3], 'run_digest', ARGV[5],
           'provenance', ARGV[9])
redis.call('HSETNX', key(id), 'started_at', ARGV[4])
if status ~= 'running' then
  move(id, 'running')
  emit(id, 'status', ARGV[6])
end
return {'run', number(id, 'attempts')}
