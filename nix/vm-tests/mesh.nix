# Three machines: a head with a shim, and two workers that join with token files. A request is answered, and still is when one
# worker's machine is gone.
{
  # nixpkgs with our overlay
  pkgs,
  # a small model and ONNX Runtime
  demoCache,
}:
let
  worker = {
    imports = [ ../../modules ];
    virtualisation = {
      memorySize = 2048;
      cores = 2;
    };
    services.hydramesh = {
      enable = true;
      role = "worker";
      headAddress = "head:7780";
      joinTokenFile = "/root/join-token";
      models = [ "${demoCache}/models/SmolLM2-135M-Instruct.Q4_1.gguf" ];
    };
    # It starts when the test has brought its token.
    systemd.services.hydramesh-worker.wantedBy = pkgs.lib.mkForce [ ];
  };
in
pkgs.testers.runNixOSTest {
  name = "hydramesh-mesh";

  nodes = {
    head = {
      imports = [ ../../modules ];
      environment.systemPackages = [
        pkgs.hydramesh
        pkgs.jq
      ];
      services.hydramesh = {
        enable = true;
        role = [
          "head"
          "shim"
        ];
        openFirewall = true;
        settings.shim.admit = "verified";
      };
    };
    worker1 = worker;
    worker2 = worker;
  };

  testScript = ''
    start_all()
    head.wait_for_unit("hydramesh-head.service")
    head.wait_for_unit("hydramesh-shim.service")

    workers = [worker1, worker2]
    for worker in workers:
        worker.wait_for_unit("multi-user.target")
        token = head.succeed(
            "hydramesh token create --admin-key-file /var/lib/hydramesh/head/admin.key"
        ).strip()
        worker.succeed(f"install -m 0600 /dev/null /root/join-token && echo '{token}' > /root/join-token")
        worker.succeed("systemctl start hydramesh-worker.service")

    count_two = "curl -fsS http://127.0.0.1:8080/v1/mesh | jq -e '.workers | length == 2'"

    with subtest("both workers join"):
        head.wait_until_succeeds(count_two, 120)

    with subtest("a question is answered, over HTTP and through the shim"):
        head.succeed("hydramesh ask --http 'Name three rivers.' | grep .")
        head.succeed("hydramesh ask --to 127.0.0.1:9999 'Name three rivers.' | grep .")

    with subtest("a worker whose process dies comes back by itself"):
        worker1.succeed("systemctl kill --signal=KILL hydramesh-worker.service")
        worker1.wait_for_unit("hydramesh-worker.service")
        head.wait_until_succeeds(count_two, 60)

    with subtest("the mesh answers with one worker's machine gone"):
        worker2.crash()
        head.succeed("hydramesh ask --http 'Name three rivers.' | grep .")
  '';
}
