/* One server of llama.cpp's RPC backend, on the CPU:
 *
 *   llama_rpc_server <backends> <host:port> <threads>
 */
#include <ggml-backend.h>

#include <stdio.h>
#include <stdlib.h>

typedef void (*start_server)(const char *endpoint, const char *cache_dir, size_t n_threads, size_t n_devices,
                             ggml_backend_dev_t *devices);

int main(int argc, char **argv) {
    if (argc != 4) {
        fprintf(stderr, "usage: %s <backends> <host:port> <threads>\n", argv[0]);
        return 2;
    }
    ggml_backend_load_all_from_path(argv[1]);
    ggml_backend_reg_t rpc = ggml_backend_reg_by_name("RPC");
    if (!rpc) {
        fprintf(stderr, "llama_rpc_server: no RPC backend in %s\n", argv[1]);
        return 1;
    }
    start_server start = (start_server)ggml_backend_reg_get_proc_address(rpc, "ggml_backend_rpc_start_server");
    ggml_backend_dev_t device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    if (!start || !device) {
        fprintf(stderr, "llama_rpc_server: this RPC backend cannot serve\n");
        return 1;
    }
    start(argv[2], NULL, strtoul(argv[3], NULL, 10), 1, &device);
    return 0;
}
