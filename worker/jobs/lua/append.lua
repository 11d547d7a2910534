-- Append a batch of events if the stream's last id is the expected one; return the last id afterwards.
-- Repeatable: a written batch has moved the last id. Does not create a stream that has expired.
-- KEYS: 1 events, 2 state. ARGV: 1 expected last id, 2 epoch, 3 worker, 4 state, 5 tokens,
--       6 error code, 7 now, 8 ttl; then id, type and payload of each event.
local owner = redis.call('HMGET', KEYS[2], 'epoch', 'worker')
if owner[1] == ARGV[2] and owner[2] ~= ARGV[3] then return '0-0' end -- the server lost our take, and another worker has the epoch
local top = top_of(KEYS[1])
local written = #ARGV > 8 and top == ARGV[#ARGV - 2] -- before: the state may lack it, if the user had no right to HSET
if not written and top ~= ARGV[1] or top == '0-0' then return top end

for i = written and #ARGV + 1 or 9, #ARGV, 3 do
  top = redis.call('XADD', KEYS[1], ARGV[i], 'type', ARGV[i + 1], 'p', ARGV[i + 2])
end
local over = ARGV[4] == 'end' or ARGV[4] == 'error'
redis.call('HSET', KEYS[2], 'epoch', ARGV[2], 'worker', ARGV[3], 'state', ARGV[4], 'tokens', ARGV[5], 'updated_ms', ARGV[7])
if over then redis.call('HSET', KEYS[2], 'ended_ms', ARGV[7]) end
if ARGV[6] ~= '' then redis.call('HSET', KEYS[2], over and 'error' or 'last_error', ARGV[6]) end
push_expiry(ARGV[8])
return top
