-- Acknowledge and delete an entry. Only if it was pending, the dead letter, if given, is added.
-- Do nothing if the server has lost the entry's delivery and thus repeats it: what followed is lost as well.
-- The dead letter comes first: its key may hold another type.
-- KEYS: 1 queue, 2 dead letters. ARGV: 1 group, 2 entry; then the dead letter's fields and values.
require_rights({
  { 'EXISTS', KEYS[1] }, { 'XINFO', 'GROUPS', KEYS[1] }, { 'XACK', KEYS[1], ARGV[1], ARGV[2] },
  { 'XDEL', KEYS[1], ARGV[2] },
})
if #ARGV > 2 then
  require_rights({ { 'XPENDING', KEYS[1], ARGV[1] }, { 'XADD', KEYS[2], '*', '', '' } })
  local pending = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[2], ARGV[2], 1)[1]
  if pending then redis.call('XADD', KEYS[2], '*', unpack(ARGV, 3)) end
end
if redis.call('XACK', KEYS[1], ARGV[1], ARGV[2]) == 0 and not was_delivered(ARGV[1], ARGV[2]) then return end
redis.call('XDEL', KEYS[1], ARGV[2])
