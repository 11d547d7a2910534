-- Prepended to every script, which calls it first, with all of its commands: name, key, arguments as in a real call.
-- Raise NOPERM if the user may not run one of them. Otherwise the server would execute the script up to there: it does
-- not undo writes. Servers whose scripts are not subject to users lack acl_check_cmd.
local function require_rights(commands)
  for _, command in ipairs(redis.acl_check_cmd and commands or {}) do
    if not redis.acl_check_cmd(unpack(command)) then
      local name, key = string.lower(command[1]), command[2]
      if name == 'xinfo' or name == 'xgroup' then name, key = name .. '|' .. string.lower(key), command[3] end
      error({ err = "NOPERM no right to run '" .. name .. "' on '" .. (key or '') .. "'" })
    end
  end
end
