# A unit file from what systemd.services holds, one line a value, as NixOS writes it.
{ lib }:
let
  text = value: if builtins.isBool value then lib.boolToString value else toString value;
  entry =
    name: value:
    if builtins.isList value then
      map (one: "${name}=${text one}") value
    else
      [ "${name}=${text value}" ];
  section =
    title: entries:
    "[${title}]\n" + lib.concatLines (lib.concatLists (lib.mapAttrsToList entry entries));
  environment =
    variables: lib.mapAttrsToList (name: value: builtins.toJSON "${name}=${toString value}") variables;
in
service:
lib.concatStringsSep "\n" [
  (section "Unit" (
    {
      Description = service.description;
      After = service.after or [ ];
      Wants = service.wants or [ ];
      Conflicts = service.conflicts or [ ];
    }
    // lib.optionalAttrs (service ? startLimitIntervalSec) {
      StartLimitIntervalSec = service.startLimitIntervalSec;
    }
    // service.unitConfig or { }
  ))
  (section "Service" (
    service.serviceConfig // { Environment = environment (service.environment or { }); }
  ))
  (section "Install" { WantedBy = service.wantedBy or [ ]; })
]
