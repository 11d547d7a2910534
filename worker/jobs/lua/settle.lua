-- Acknowledge an entry. Only the call that does so adds the dead letter, if given, and deletes the entry.
-- KEYS: 1 queue, 2 dead letters. ARGV: 1 group, 2 entry; then the dead letter's fields and values.
local acknowledged = redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
if acknowledged == 1 then
  if #ARGV > 2 then redis.call('XADD', KEYS[2], '*', unpack(ARGV, 3)) end
  redis.call('XDEL', KEYS[1], ARGV[2])
end
return acknowledged
