-- Append a batch of events if the stream's last id is the expected one; return the last id afterwards.
-- Repeatable: a written batch has moved the last id. Does not create a stream that has expired.
-- KEYS: 1 events, 2 state. ARGV: 1 expected last id, 2 epoch, 3 worker and 4 time of the attempt, 5 state,
--       6 tokens, 7 error code, 8 now, 9 ttl, 10 (or empty) the attempt whose events precede the first one; then id,
--       type and payload of each event.
require_rights({
  { 'EXISTS', KEYS[1] }, { 'XINFO', 'STREAM', KEYS[1] }, { 'XADD', KEYS[1], '*', '', '' }, { 'PEXPIRE', KEYS[1], 1 },
  { 'HMGET', KEYS[2], '' }, { 'HSET', KEYS[2], '', '' }, { 'PEXPIRE', KEYS[2], 1 },
})
local owner = redis.call('HMGET', KEYS[2], 'epoch', 'worker', 'taken_ms')
if owner[1] == ARGV[2] and (owner[2] ~= ARGV[3] or owner[3] ~= ARGV[4]) then
  return '0-0' -- the server lost our take, and another attempt, perhaps of the same worker, has the epoch
end
local top = top_of(KEYS[1])
if top ~= ARGV[1] or top == '0-0' then return top end
if ARGV[10] ~= '' and ARGV[10] ~= (owner[2] or '') .. ' ' .. (owner[3] or '') then
  return '0-0' -- the server lost our take, and others have written under the ids before it
end

for i = 11, #ARGV, 3 do
  top = redis.call('XADD', KEYS[1], ARGV[i], 'type', ARGV[i + 1], 'p', ARGV[i + 2])
end
local over = ARGV[5] == 'end' or ARGV[5] == 'error'
redis.call('HSET', KEYS[2], 'epoch', ARGV[2], 'worker', ARGV[3], 'taken_ms', ARGV[4], 'state', ARGV[5], 'tokens', ARGV[6],
  'updated_ms', ARGV[8])
if over then redis.call('HSET', KEYS[2], 'ended_ms', ARGV[8]) end
if ARGV[7] ~= '' then redis.call('HSET', KEYS[2], over and 'error' or 'last_error', ARGV[7]) end
push_expiry(ARGV[9])
return top
