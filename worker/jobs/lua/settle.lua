-- Acknowledge and delete an entry. Only if it was pending, the dead letter, if given, is added.
-- Do nothing if the server has lost the entry's delivery and thus repeats it: what followed is lost as well.
-- A repetition completes a call that was refused in its middle; the dead letter comes first, so that it is not lost.
-- KEYS: 1 queue, 2 dead letters. ARGV: 1 group, 2 entry; then the dead letter's fields and values.
if #ARGV > 2 and redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[2], ARGV[2], 1)[1] then
  redis.call('XADD', KEYS[2], '*', unpack(ARGV, 3))
end
if redis.call('XACK', KEYS[1], ARGV[1], ARGV[2]) == 0 and not was_delivered(ARGV[1], ARGV[2]) then return end
redis.call('XDEL', KEYS[1], ARGV[2])
