# One OCI image: `nix build .#mesh-worker-nvidia && ./result | podman load`.
#
# Layers: streamLayeredImage gives every store path a layer of its own as long as there are no more paths than maxLayers, and what
# is left over shares the last one. A layer depends on nothing but its store path. So a new version of our program changes
# the layer of the program, the small one with links and folders, and the configuration, and a registry is sent only these;
# ONNX Runtime's and CUDA's layers stay. maxLayers is therefore as high as container runtimes allow (127), and the image holds
# one program, so that its closure stays below that.
{
  lib,
  role,
  backend,
  # what nix/hydramesh.nix gives for the backend
  build,
}:
let
  inherit (build) pkgs version ortLibrary;
  name = "mesh-${role}";
  program = build.program name;
  user = "hydramesh";
  id = "10001";
  users = pkgs.fakeNss.override {
    extraPasswdLines = [ "${user}:x:${id}:${id}:HydraMesh:/var/lib/hydramesh:/sbin/nologin" ];
    extraGroupLines = [ "${user}:x:${id}:" ];
  };
in
pkgs.dockerTools.streamLayeredImage {
  name = "alh477/${name}${lib.optionalString (role == "worker") "-${backend}"}";
  tag = version;
  maxLayers = 125;
  contents = [
    # /bin/mesh-head and the like
    program
    users
    pkgs.dockerTools.caCertificates
  ];
  # The root may be read-only: state is written below /var/lib/hydramesh, which a fresh volume takes over with its owner.
  fakeRootCommands = ''
    mkdir -p var/lib/hydramesh/models tmp
    chown -R ${id}:${id} var/lib/hydramesh
    chmod 0750 var/lib/hydramesh
    chmod 1777 tmp
  '';
  config = import ./config.nix (
    {
      inherit role backend version;
      bin = lib.getExe program;
      tini = lib.getExe pkgs.tini;
      caBundle = "${pkgs.cacert}/etc/ssl/certs/ca-bundle.crt";
    }
    // lib.optionalAttrs (role == "worker") { inherit ortLibrary; }
  );
}
