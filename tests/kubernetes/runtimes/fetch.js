// The handler for Bun and Deno.
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));

export default async function answer(request) {
  const { pathname, searchParams } = new URL(request.url);
  const number = (name) => Number(searchParams.get(name));
  switch (pathname) {
    case '/':
      return new Response('hello\n');
    case '/slow':
      await sleep(number('ms'));
      return new Response('done\n');
    case '/stream':
      return new Response(lines(number('n'), number('ms')));
    case '/upload': {
      let bytes = 0;
      for await (const chunk of request.body) bytes += chunk.length;
      return Response.json({ bytes, by: 'fetch' });
    }
    default:
      return new Response('not found\n', { status: 404 });
  }
}

function lines(n, ms) {
  let i = 0;
  return new ReadableStream({
    async pull(to) {
      if (i > 0) await sleep(ms);
      i += 1;
      to.enqueue(new TextEncoder().encode(`line ${i} of ${n}\n`));
      if (i === n) to.close();
    },
  });
}
