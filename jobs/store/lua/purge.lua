-- ARGV: id. Returns 1, or 0 where there was no such job.
begin_to_free()
if not mend(ARGV[1]) then return 0 end
forget(ARGV[1])
return 1
