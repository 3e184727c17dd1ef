# An image's configuration with the paths of a Debian base, for scripts/test_images.sh.
{
  role,
  version ? "0.0.0-test",
}:
import ../../images/config.nix {
  inherit role version;
  bin = "/bin/mesh-${role}";
  tini = "/usr/bin/tini";
  caBundle = "/etc/ssl/certs/ca-certificates.crt";
  ortLibrary = "/opt/onnxruntime/libonnxruntime.so";
}
