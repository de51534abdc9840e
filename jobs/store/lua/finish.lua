-- ARGV: id, execution ('' for the janitor: any active job), status, now, status data,
-- name and data of the last event, error, result. Returns 1 or 0 (lost).
begin_to_free()
local id = ARGV[1]
if not mend(id) then return 0 end
if ARGV[2] == '' then
  if not active(get(id, 'status')) then return 0 end
  redis.call('HDEL', key(id), 'execution')  -- that one did not end it, whatever it says later
elseif not held(id, ARGV[2]) then
  -- Said again, since the answer to the first was lost on its way.
  return get(id, 'execution') == ARGV[2] and get(id, 'status') == ARGV[3] and 1 or 0
end
if ARGV[8] ~= '' then redis.call('HSET', key(id), 'error', ARGV[8]) end
if ARGV[9] ~= '' then redis.call('HSET', key(id), 'result', ARGV[9]) end
finish(id, ARGV[3], tonumber(ARGV[4]), ARGV[5], ARGV[6], ARGV[7])
return 1
