# One machine with all three roles: what scripts/test_vm.sh boots with the units that the module makes of it.
{
  services.hydramesh = {
    enable = true;
    role = [
      "head"
      "worker"
      "shim"
    ];
    joinTokenFile = "/etc/hydramesh/join-token";
    models = [ "/opt/hydramesh/models/SmolLM2-135M-Instruct.Q4_1.gguf" ];
    # The same in parts: the worker measures the machine and listens for others, of which there are none.
    ringModels = [ "/opt/hydramesh/models/SmolLM2-135M-Instruct.Q4_1.gguf" ];
    memoryHigh = "1500M";
    memoryMax = "2G";
    settings.worker = {
      kv_memory = "256MiB";
      ring.memory = "512MiB";
      context = 1024;
    };
  };
}
