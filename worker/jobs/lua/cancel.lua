-- Flag a running job; end a waiting or unknown one with the terminal event. A finished job is unchanged.
-- KEYS: 1 events, 2 state. ARGV: 1 expected last id, 2 epoch, 3 now, 4 ttl, 5 type, 6 payload.
require_rights({
  { 'EXISTS', KEYS[1] }, { 'XINFO', 'STREAM', KEYS[1] }, { 'XADD', KEYS[1], '*', '', '' }, { 'PEXPIRE', KEYS[1], 1 },
  { 'HGETALL', KEYS[2] }, { 'HSET', KEYS[2], '', '' }, { 'PEXPIRE', KEYS[2], 1 },
})
local top, state = top_of(KEYS[1]), hash(KEYS[2])

if is_over(state) then return state.error == 'CANCELLED' and 'CANCELLED' or 'OVER' end
if state.state == 'running' then
  redis.call('HSET', KEYS[2], 'cancel', ARGV[3])
  return 'REQUESTED'
end
if top ~= ARGV[1] or next_epoch(top, state) ~= tonumber(ARGV[2]) then return 'RETRY' end

redis.call('XADD', KEYS[1], ARGV[2] .. '-0', 'type', ARGV[5], 'p', ARGV[6])
redis.call('HSET', KEYS[2], 'state', 'error', 'error', 'CANCELLED', 'epoch', ARGV[2], 'cancel', ARGV[3], 'ended_ms', ARGV[3])
push_expiry(ARGV[4])
return 'CANCELLED'
