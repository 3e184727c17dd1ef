# HydraMesh for one backend: the programs, the package that knows its ONNX Runtime, and what checks and images need of them.
{
  lib,
  pkgs,
  crane,
  # "cpu", "images", "nvidia" or "rocm"
  backend,
}:
let
  settings = (import ./backends.nix).${backend};
  craneLib = crane.mkLib pkgs;
  src = import ./source.nix { inherit lib; };
  inherit (lib.importTOML ../rust/Cargo.toml) workspace;
  inherit (workspace.package) version;

  onnxruntime = settings.onnxruntime pkgs;
  # The programs ask it for API 24, which came with 1.24.
  ortLibrary =
    lib.throwIf (lib.versionOlder onnxruntime.version "1.24")
      "hydramesh: this nixpkgs has ONNX Runtime ${onnxruntime.version}, and 1.24 or newer is needed: let nixpkgs follow hydramesh/nixpkgs"
      "${lib.getLib onnxruntime}/lib/libonnxruntime.so";
  driverLibraries = settings.driverLibraries pkgs;
  webgpuPlugin = (settings.webgpuPlugin or (_pkgs: null)) pkgs;
  libtorch = settings.libtorch pkgs;

  cargoVendorDir = craneLib.vendorCargoDeps { inherit src; };
  # No protoc and no CMake: messages are derived from Rust types, and the C libraries inside of crates build with cc.
  commonArgs = {
    inherit src version cargoVendorDir;
    pname = "hydramesh";
    strictDeps = true;
  }
  // lib.optionalAttrs (libtorch != null) {
    buildInputs = [ libtorch.lib ];
    env = {
      LIBTORCH = "${libtorch.dev}";
      LIBTORCH_INCLUDE = "${libtorch.dev}";
      LIBTORCH_LIB = "${libtorch.lib}";
    };
  };
  # All crates but the one that is linked with libtorch, where the backend has none.
  everyCrate = "--workspace${lib.optionalString (libtorch == null) " --exclude mesh-engine-tch"}";
  cargoArtifacts = craneLib.buildDepsOnly (
    commonArgs // { cargoExtraArgs = "--locked ${everyCrate}"; }
  );

  features = lib.optionalString (
    settings.cargoFeatures != [ ]
  ) " --features ${lib.concatStringsSep "," settings.cargoFeatures}";

  # The programs as cargo builds them. ONNX Runtime is loaded at run time, so they do not refer to it.
  unwrapped = craneLib.buildPackage (
    commonArgs
    // {
      inherit cargoArtifacts;
      cargoExtraArgs = "--locked --bins -p mesh-head -p mesh-worker -p mesh-shim -p mesh-cli${features}";
      # Tests are checks of their own.
      doCheck = false;
      nativeBuildInputs = [ pkgs.installShellFiles ];
      postInstall = lib.optionalString (pkgs.stdenv.buildPlatform.canExecute pkgs.stdenv.hostPlatform) ''
        for shell in bash fish zsh; do
          $out/bin/hydramesh completions $shell > hydramesh.$shell
        done
        installShellCompletion --cmd hydramesh --bash hydramesh.bash --fish hydramesh.fish --zsh hydramesh.zsh
      '';
      # Linkers leave out libraries that nothing refers to, and then libtorch finds no GPU.
      postFixup = lib.optionalString (libtorch != null) ''
        if ! patchelf --print-needed $out/bin/mesh-worker | grep --quiet --line-regexp libtorch.so; then
          echo "mesh-worker is not linked against libtorch.so: see build.rs of mesh-worker" >&2
          exit 1
        fi
      '';
      meta = {
        description = "One inference mesh out of the machines you have";
        license = lib.licenses.bsd3;
        mainProgram = "hydramesh";
        platforms = lib.platforms.linux;
      };
    }
  );

  # A compiled wrapper, not a script: the services need no shell.
  package =
    pkgs.runCommand "hydramesh${settings.suffix}-${version}"
      {
        pname = "hydramesh${settings.suffix}";
        inherit version;
        nativeBuildInputs = [ pkgs.makeBinaryWrapper ];
        passthru = {
          # Of the module's option. The build with images is one for CPUs.
          backend = if backend == "images" then "cpu" else backend;
          inherit
            unwrapped
            onnxruntime
            src
            # Every dependency's source, for building without a network.
            cargoVendorDir
            ;
        };
        inherit (unwrapped) meta;
      }
      ''
        mkdir -p $out/bin
        # Not there when the programs cannot run where they are built, and so cannot print their completions.
        if [ -d ${unwrapped}/share ]; then
          ln -s ${unwrapped}/share $out/share
        fi
        ln -s ${unwrapped}/bin/mesh-head ${unwrapped}/bin/mesh-shim $out/bin/
        for program in mesh-worker hydramesh; do
          makeWrapper ${unwrapped}/bin/$program $out/bin/$program \
            --set-default ORT_DYLIB_PATH ${ortLibrary} ${
              lib.optionalString (
                webgpuPlugin != null
              ) "--set-default ORT_WEBGPU_EP ${webgpuPlugin}/lib/libonnxruntime_providers_webgpu.so"
            } ${lib.concatMapStringsSep " " (folder: "--suffix LD_LIBRARY_PATH : ${folder}") driverLibraries}
        done
      '';

  # One program alone, so that an image carries neither the others nor ONNX Runtime where it is not used.
  program =
    name:
    pkgs.runCommand "${name}-${version}" { meta.mainProgram = name; } ''
      install -D -m 755 ${unwrapped}/bin/${name} $out/bin/${name}
    '';
in
{
  inherit
    pkgs
    craneLib
    commonArgs
    cargoArtifacts
    everyCrate
    version
    unwrapped
    package
    program
    onnxruntime
    ortLibrary
    ;
}
