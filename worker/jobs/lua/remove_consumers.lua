-- Delete idle consumers without pending entries: DELCONSUMER would discard these, and lose jobs.
-- KEYS: 1 queue. ARGV: 1 group, 2 minimum idle ms, 3 (optional) the only consumer to consider.
require_rights({
  { 'EXISTS', KEYS[1] }, { 'XINFO', 'CONSUMERS', KEYS[1], ARGV[1] }, { 'XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], '' },
})
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
local removed = 0
for _, flat in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local of = {}
  for i = 1, #flat, 2 do of[flat[i]] = flat[i + 1] end
  if of.pending == 0 and of.idle >= tonumber(ARGV[2]) and (not ARGV[3] or of.name == ARGV[3]) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], of.name)
    removed = removed + 1
  end
end
return removed
