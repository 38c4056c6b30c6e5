# The demo in a container: docker build -t hessfn . && docker run --rm -v "$PWD/report:/report" hessfn
FROM python:3.13-slim
# The compiler is for the kernel of convolutions, which is built at first use.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc g++ && rm -rf /var/lib/apt/lists/*
# The build of torch without CUDA: a tenth of the size.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir torch --index-url "$TORCH_INDEX"
COPY . /source
RUN pip install --no-cache-dir "/source[demo]" && rm -rf /source
ENV OMP_NUM_THREADS=1
ENTRYPOINT ["hessfn"]
CMD ["report", "--out", "/report"]
